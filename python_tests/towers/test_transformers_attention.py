"""Re-weighted attention through transformers' registry: the user's own setting is kept."""

import copy
import io
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_transformers import MODELS, WIDTHS, image_features, make_clip, text_features
from tiny_clip import make_images, make_token_ids
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from tir_kernels import adapters, analysis, towers

# The equalities of a family in all its kinds take long together.
pytestmark = pytest.mark.slow

PLACEMENTS = ("tokens", "attention", "both", "values")


def adapted(kind: str, placement: str) -> tuple[Any, adapters.Reweighting]:
    model = MODELS[kind]()
    lora = adapters.add_lora(model, rank=2, dropout=0.0)
    generator = torch.Generator().manual_seed(4)
    for parameter in lora.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    handle = adapters.add_reweighting(model, [0, 1], placement)
    handle.set_class_embeddings(classes_for(kind))
    return model, handle


def classes_for(kind: str) -> Tensor:
    return torch.randn(5, WIDTHS[kind], generator=torch.Generator().manual_seed(2))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The module and mask of each call of a user's own function, which is registered as "own"."""
    calls: list[tuple[Any, Any]] = []

    def own(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        calls.append((module, mask))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "own", own)
    return calls


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_other_blocks_keep_the_users_function(kind: str, recorded: list[tuple[Any, Any]]) -> None:
    model = MODELS[kind]("own")
    layers = model.vision_model.encoder.layers
    with adapters.add_lora(model, rank=2, towers=["visual"]):
        with adapters.add_reweighting(model, [1], "attention") as handle:
            handle.set_class_embeddings(classes_for(kind))
            image_features(model, make_images())
        reweighted = [module for module, _ in recorded]
        recorded.clear()
        image_features(model, make_images())
    assert reweighted == [layers[0].self_attn, layers[2].self_attn]
    assert [module for module, _ in recorded] == [layer.self_attn for layer in layers]
    assert layers[1].self_attn.config is model.config.vision_config


@torch.no_grad()
def test_the_setting_can_change_while_an_adapter_is_on() -> None:
    model, images = make_clip("eager"), make_images()
    with adapters.add_reweighting(model, [1], "attention") as handle:
        handle.set_class_embeddings(classes_for("clip"))
        expected = image_features(model, images)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(image_features(model, images), expected)
    for layer in model.vision_model.encoder.layers:
        assert layer.self_attn.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_eager_attention_is_given_with_its_weights() -> None:
    model, images = make_clip("eager"), make_images()
    with adapters.add_reweighting(model, [1], "attention") as handle:
        handle.set_class_embeddings(classes_for("clip"))
        attentions = model.vision_model(images, output_attentions=True).attentions
    assert len(attentions) == 3
    for attention in attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, 2, 17))
    plain = model.vision_model(images, output_attentions=True).attentions
    assert torch.equal(plain[0], attentions[0])
    assert not torch.allclose(plain[1], attentions[1], atol=1e-3)


@torch.no_grad()
def test_flash_attention_gets_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append((mask, options["is_causal"]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "my_flash_attention", flash)
    model, ids = make_clip(), make_token_ids()
    expected = text_features(model, ids)
    model.text_model.config._attn_implementation = "my_flash_attention"
    tower = towers.text_tower(model)
    found, _ = tower.encode(tower.embed(ids), tower.last_position(ids))
    torch.testing.assert_close(found, expected)
    assert seen == [(None, True)] * 2


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deep copy": copy.deepcopy,
    "saved and loaded": saved_and_loaded,
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_copy_has_handles_of_its_own(kind: str, copied: str, placement: str) -> None:
    model, handle = adapted(kind, placement)
    images = make_images()
    expected = image_features(model, images)
    again = COPIES[copied](model)
    own = adapters.reweighting_of(again)
    assert own is not handle
    for parameter in model.parameters():  # the original's play no part
        parameter.zero_()
    assert torch.equal(image_features(again, images), expected)
    own.remove()
    adapters.loras_of(again)[0].remove()
    plain = MODELS[kind]()
    assert torch.equal(image_features(again, images), image_features(plain, images))
    assert {type(module) for module in again.modules()} == {type(m) for m in plain.modules()}
    assert adapters.reweighting_of(model) is handle


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", MODELS)
def test_each_thread_gets_its_own_result(kind: str, placement: str) -> None:
    model, _ = adapted(kind, placement)
    parameters = [p for name, p in model.vision_model.named_parameters() if "low_rank" in name]
    batches = [make_images(2 + thread) for thread in range(4)]

    def results(images: Tensor) -> list[Tensor]:
        features = image_features(model, images)
        return [features, *torch.autograd.grad(features.square().sum(), parameters)]

    expected = [results(images) for images in batches]

    def work(thread: int) -> int:
        found = [results(batches[thread]) for _ in range(10)]
        return sum(not all(map(torch.equal, each, expected[thread])) for each in found)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [0] * 4
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # newer: activation_...
@pytest.mark.parametrize("kind", MODELS)
def test_gradient_checkpointing(kind: str) -> None:
    model, handle = adapted(kind, "both")
    images = make_images()
    expected = image_features(model, images)
    parameters = [p for name, p in model.vision_model.named_parameters() if "low_rank" in name]
    grads = torch.autograd.grad(expected.square().sum(), parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = []
    model.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    found = image_features(model, images)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), parameters), grads)
    assert len(calls) == 2  # the second time for the backward pass
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_compiled_towers(kind: str) -> None:
    model, _ = adapted(kind, "both")
    encoder = towers.ImageEncoder(model)
    tokens = encoder.embed(make_images())
    compiled = torch.compile(encoder.features, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), encoder.features(tokens))


@pytest.mark.parametrize("kind", MODELS)
def test_measures_see_the_attention_of_all_blocks(kind: str) -> None:
    model = MODELS[kind]()
    measures = [analysis.measure_class("sink-ratio")()]
    findings = analysis.measure(model, make_images(), measures)
    assert {finding.block for finding in findings} == {0, 1, 2}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_patches_can_be_ordered_by_their_attention(kind: str) -> None:
    model, images = MODELS[kind](), make_images()
    with adapters.add_reweighting(model, [1], order=adapters.MostAttended()) as handle:
        handle.set_class_embeddings(classes_for(kind))
        image_features(model, images)
        ordered = handle.last_counts[1]
    with adapters.add_reweighting(model, [1]) as handle:
        handle.set_class_embeddings(classes_for(kind))
        image_features(model, images)
        own = handle.last_counts[1]
    assert torch.equal(ordered.sort(1).values, own.sort(1).values)
    assert not torch.equal(ordered, own)
