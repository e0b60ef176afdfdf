"""Copies of an adapted model, and replicas, stand on their own."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_clip import make_class_embeddings, make_clip, make_images
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tir_kernels import adapters

PLACEMENTS = ("tokens", "attention", "both", "values")


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deep copy": copy.deepcopy,
    "averaged": averaged,
    "saved and loaded": saved_and_loaded,
}


def adapted(placement: str) -> tuple[nn.Module, adapters.LoRA, adapters.Reweighting]:
    model = make_clip()
    lora = adapters.add_lora(model, rank=2, dropout=0.0)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=0.2)
    handle = adapters.add_reweighting(model, placement=placement)
    handle.set_class_embeddings(make_class_embeddings())
    return model, lora, handle


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", COPIES)
@torch.no_grad()
def test_a_copy_has_handles_of_its_own(kind: str, placement: str) -> None:
    model, lora, handle = adapted(placement)
    images, classes = make_images(), make_class_embeddings()
    handle.set_class_embeddings(-classes)
    flipped = model.encode_image(images)
    handle.set_class_embeddings(classes)
    expected = model.encode_image(images)
    again = COPIES[kind](model)

    own, (own_lora,) = adapters.reweighting_of(again), adapters.loras_of(again)
    assert own is not handle
    assert own_lora is not lora
    counts = {layer: each.clone() for layer, each in handle.last_counts.items()}
    for parameter in model.parameters():  # the original's play no part
        parameter.zero_()
    assert torch.equal(again.encode_image(images), expected)
    own.set_class_embeddings(-classes)
    assert torch.equal(again.encode_image(images), flipped)
    for layer, of_layer in counts.items():
        assert torch.equal(handle.last_counts[layer], of_layer)
        assert not torch.equal(own.last_counts[layer], of_layer)
    with pytest.raises(RuntimeError, match=r"re-weighted already.*reweighting_of\(model\)"):
        adapters.add_reweighting(again)
    with pytest.raises(RuntimeError, match=r"LoRA already.*loras_of\(model\)"):
        adapters.add_lora(again)


@pytest.mark.parametrize("kind", COPIES)
@torch.no_grad()
def test_removing_from_a_copy_leaves_the_original(kind: str) -> None:
    model, lora, handle = adapted("both")
    images = make_images()
    expected = model.encode_image(images)
    again = COPIES[kind](model)
    adapters.reweighting_of(again).remove()
    adapters.loras_of(again)[0].remove()
    plain = make_clip()
    assert torch.equal(again.encode_image(images), plain.encode_image(images))
    assert {type(module) for module in again.modules()} == {type(m) for m in plain.modules()}
    assert torch.equal(model.encode_image(images), expected)
    handle.remove()
    lora.remove()
    assert adapters.loras_of(model) == []
    with pytest.raises(ValueError, match=r"not re-weighted: call add_reweighting\(model\)"):
        adapters.reweighting_of(model)


def replica_of(model: nn.Module, device: str = "cpu") -> nn.Module:
    """As ``torch.nn.parallel.replicate`` makes one for another device."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        replica: Any = copies[id(module)]
        replica._former_parameters = {}
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.to(device, copy=True))
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.to(device, copy=True)
    return copies[id(model)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_replicas_use_their_own_blocks(placement: str) -> None:
    model, _, _ = adapted(placement)
    images = make_images()
    expected = model.encode_image(images)
    parameters = list(model.visual.transformer.parameters())
    expected_grads = torch.autograd.grad(expected.square().sum(), parameters)
    replica = replica_of(model)
    originals = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    found = replica.encode_image(images)
    assert torch.equal(found, expected)
    with torch.no_grad():  # a product's gradient is taken with the values it was formed with
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)
    grads = torch.autograd.grad(replica_loss(replica_of(model), images), parameters)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, expected_grad)


def replica_loss(replica: nn.Module, images: Tensor) -> Tensor:
    return replica.encode_image(images).square().sum()


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_replicas_may_be_on_another_device(placement: str) -> None:
    model, _, handle = adapted(placement)
    handle.table = torch.linspace(0.5, 1.5, 6)
    output = replica_of(model, "meta").encode_image(make_images().to("meta"))
    assert output.shape == (4, 16)
    assert output.device.type == "meta"


@torch.no_grad()
def test_assigned_weights_survive_lora() -> None:
    model, other = make_clip(), make_clip()
    for parameter in other.parameters():
        parameter.mul_(1.5)
    lora = adapters.add_lora(model, rank=2)
    model.load_state_dict(other.state_dict(), strict=False, assign=True)
    lora.remove()
    assert list(model.state_dict()) == list(other.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    images = make_images()
    assert torch.equal(model.encode_image(images), other.encode_image(images))
