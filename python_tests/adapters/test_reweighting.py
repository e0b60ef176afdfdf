from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from reweighted_tower import PLACEMENTS, VARIANTS, classes_for, plain_encode_image
from tiny_clip import (
    TEXT,
    Untouched,
    make_clip,
    make_images,
    make_token_ids,
    refused,
    swap_token_order,
)
from torch import Tensor

from tir_kernels import WeightRule, adapters, token_weights
from tir_kernels.towers import vision_tower


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_computes_the_formula(variant: str, placement: str) -> None:
    model = VARIANTS[variant]()
    images, classes = make_images(), classes_for(model)
    with torch.no_grad():
        unweighted, texts = model.encode_image(images), model.encode_text(make_token_ids())
    expected, counts = plain_encode_image(model, images, classes, (2, 4), placement)
    expected_grads = torch.autograd.grad(expected.square().sum(), list(model.visual.parameters()))
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes)
        found = model.encode_image(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert list(handle.last_counts) == [2, 4]
        for layer, of_layer in handle.last_counts.items():
            assert of_layer.dtype == torch.int32
            assert torch.equal(of_layer, counts[layer])
        grads = torch.autograd.grad(found.square().sum(), list(model.visual.parameters()))
        names = [name for name, _ in model.visual.named_parameters()]
        scales = {n: g.abs().max().item() for n, g in zip(names, expected_grads, strict=True)}
        for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
            # What is added to all keys alike changes no softmax: its gradient is rounding alone.
            scale = scales[name.replace("ln_k.bias", "ln_k.weight")]
            torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-5 * scale)
        assert torch.equal(model.encode_text(make_token_ids()), texts)
    assert not torch.allclose(expected, unweighted, atol=1e-2)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("training", [True, False])
def test_acts_in_training_and_in_evaluation(placement: str, training: bool) -> None:
    model = make_clip().train(training)
    images, classes = make_images(), classes_for(model)
    expected, _ = plain_encode_image(model, images, classes, (2, 4), placement)
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes)
        torch.testing.assert_close(model.encode_image(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length_first", [True, False])
@torch.no_grad()
def test_counts_are_those_of_the_tokens_that_enter_the_block(length_first: bool) -> None:
    model = make_clip()
    if length_first:
        swap_token_order(model)
    classes, rule = classes_for(model), WeightRule("extremes", 0.2, top_ratio=0.4)
    entered: dict[int, Tensor] = {}
    for layer in (1, 3):  # registered first, so they see the tokens before re-weighting
        block = model.visual.transformer.resblocks[layer]
        block.register_forward_pre_hook(
            lambda _, inputs, layer=layer: entered.__setitem__(layer, inputs[0])
        )
    with adapters.add_reweighting(model, [1, 3], "tokens", rule) as handle:
        handle.set_class_embeddings(classes)
        model.encode_image(make_images())
    for layer, tokens in entered.items():
        tokens = tokens.transpose(0, 1) if length_first else tokens
        expected = token_weights(
            tokens, classes, joint_space=vision_tower(model).joint_space, rule=rule
        )
        assert torch.equal(handle.last_counts[layer], expected.counts)
        assert handle.last_counts[layer].shape == (4, 16)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_groups_have_classes_of_their_own(placement: str) -> None:
    model = make_clip()
    images, classes = make_images(6), classes_for(model, 3)
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes)
        together, counts = model.encode_image(images), handle.last_counts[4]
        for group in range(3):
            own = slice(2 * group, 2 * group + 2)
            handle.set_class_embeddings(classes[group])
            torch.testing.assert_close(model.encode_image(images[own]), together[own])
            assert torch.equal(handle.last_counts[4], counts[own])
        handle.set_class_embeddings(classes_for(model, 4))
        with pytest.raises(ValueError, match="class_embeddings"):
            model.encode_image(images)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_learnable_table_gets_its_gradient(placement: str) -> None:
    model = make_clip()
    images, classes = make_images(), classes_for(model)
    table = torch.tensor([1.0, 1.6, 1.2, 0.9, 0.4, 0.1], requires_grad=True)
    expected, _ = plain_encode_image(model, images, classes, (2, 4), placement, table)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), table)
    with adapters.add_reweighting(model, placement=placement, table=table) as handle:
        handle.set_class_embeddings(classes)
        found = model.encode_image(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(found.square().sum(), table)
    assert (grad != 0).sum() >= 3
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-3)


def test_a_table_of_the_wrong_length_is_refused() -> None:
    model = make_clip()
    with adapters.add_reweighting(model, table=torch.ones(4)) as handle:
        handle.set_class_embeddings(classes_for(model))
        with pytest.raises(ValueError, match="table"):
            model.encode_image(make_images())


def test_no_gradient_flows_to_the_classes() -> None:
    model = make_clip()
    classes = classes_for(model).requires_grad_()
    with adapters.add_reweighting(model, placement="both") as handle:
        handle.set_class_embeddings(classes)
        model.encode_image(make_images()).sum().backward()
    assert classes.grad is None


@torch.no_grad()
def test_no_weights_leave_the_result() -> None:
    model = make_clip()
    expected = model.encode_image(make_images())
    for placement in PLACEMENTS:
        with adapters.add_reweighting(model, placement=placement, rule="none") as handle:
            handle.set_class_embeddings(classes_for(model))
            torch.testing.assert_close(model.encode_image(make_images()), expected)


@pytest.mark.parametrize(
    ("given", "depth", "expected"),
    [
        (None, 12, (8, 10)),
        (None, 6, (2, 4)),
        (None, 4, (0, 2)),
        ([0], 6, (0,)),
        ([-1, 3], 6, (5, 3)),
        ([-6], 6, (0,)),
        (range(2), 6, (0, 1)),
    ],
)
def test_layers(given: Any, depth: int, expected: tuple[int, ...]) -> None:
    with adapters.add_reweighting(make_clip({"layers": depth}), given) as handle:
        assert handle.layers == expected


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"layers": [6]}, ValueError, "layers must lie between 0 and 5; got 6"),
        ({"layers": [-7]}, ValueError, "layers must lie between 0 and 5; got -7"),
        ({"layers": [2, 2]}, ValueError, r"each block once; got \(2, 2\)"),
        ({"layers": [5, -1]}, ValueError, r"each block once; got \(5, -1\)"),
        ({"layers": [1.0]}, TypeError, "whole numbers; got float"),
        ({"layers": [True]}, TypeError, "whole numbers; got bool"),
        ({"placement": "heads"}, ValueError, "placement must be one of tokens, attention, both, "),
        ({"rule": "loud"}, ValueError, "kind must be one of linear, .*; got 'loud'"),
        ({"rule": 0.5}, TypeError, "rule must be a WeightRule or its kind; got float"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = make_clip()
    with refused(model, kind, message):
        adapters.add_reweighting(model, **arguments)


def test_shallow_towers_need_layers() -> None:
    model = make_clip({"layers": 3})
    with pytest.raises(ValueError, match="layers must be given for a tower of 3 blocks"):
        adapters.add_reweighting(model)
    with adapters.add_reweighting(model, [1]) as handle:
        assert handle.layers == (1,)


def test_an_unknown_backend_is_refused() -> None:
    model = make_clip()
    with adapters.add_reweighting(model, backend="abacus") as handle:
        handle.set_class_embeddings(classes_for(model))
        with pytest.raises(ValueError, match="abacus"):
            model.encode_image(make_images())


def test_class_embeddings_must_be_set() -> None:
    model = make_clip()
    with adapters.add_reweighting(model) as handle:
        with pytest.raises(RuntimeError, match="class embeddings are not set"):
            model.encode_image(make_images())
        assert model.encode_text(make_token_ids()).shape == (3, 16)
        with pytest.raises(TypeError, match="must be a tensor; got list"):
            handle.set_class_embeddings([[1.0]])
        with pytest.raises(ValueError, match=r"\(C, E\) or \(G, C, E\); got \(16,\)"):
            handle.set_class_embeddings(torch.ones(16))
        handle.set_class_embeddings(torch.ones(5, 8))
        with pytest.raises(ValueError, match="8"):
            model.encode_image(make_images())


def test_unsuitable_towers_are_refused() -> None:
    timm_tower = {"timm_model_name": "test_convnext", "image_size": 32}
    with pytest.raises(ValueError, match="image tower is timm's ConvNeXt"):
        adapters.add_reweighting(CLIP(16, timm_tower, TEXT))


@torch.no_grad()
def test_attention_of_another_kind_takes_placement_tokens_only() -> None:
    model = make_clip({"scale_heads": True})
    model.visual.transformer.resblocks[4].attn.attn_drop.p = 0.1
    before = Untouched(model)
    for placement in ("attention", "both"):
        with pytest.raises(TypeError, match=r"got Attention\. Choose .* or placement 'tokens'"):
            adapters.add_reweighting(model, placement=placement)
        before.check()
    with adapters.add_reweighting(model) as handle:
        handle.set_class_embeddings(classes_for(model))
        assert model.encode_image(make_images()).isfinite().all()
    before.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_installing_twice_is_refused(placement: str) -> None:
    model = make_clip()
    before = Untouched(model)
    with adapters.add_reweighting(model, placement=placement) as handle:
        for target in (model, model.visual):
            with pytest.raises(RuntimeError, match=r"re-weighted already: call remove\(\)"):
                adapters.add_reweighting(target, [0])
        handle.set_class_embeddings(classes_for(model))
        model.encode_image(make_images())
        assert list(handle.last_counts) == [2, 4]
    before.check()
    with adapters.add_reweighting(model):
        handle.remove()  # of the first: does not touch the second
        with pytest.raises(RuntimeError, match="re-weighted already"):
            adapters.add_reweighting(model)
    before.check()
