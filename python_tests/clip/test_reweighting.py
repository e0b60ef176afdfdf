import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from oracle import pick_counts, plain_relevance
from tiny_clip import (
    TEXT,
    Untouched,
    make_class_embeddings,
    make_clip,
    make_images,
    make_token_ids,
    swap_token_order,
)
from torch import Tensor, nn

from tir_kernels import WeightRule, adapters, token_weights
from tir_kernels.towers.open_clip import joint_space

PLACEMENTS = ("tokens", "attention", "both")
VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "clip": make_clip,
    "custom text": lambda: make_clip(custom_text=True),
    "length first": lambda: swap_token_order(make_clip()),
    "quick gelu": lambda: make_clip(quick_gelu=True),
    "no first norm, layer scale": lambda: make_clip({"no_ln_pre": True, "ls_init_value": 0.3}),
    "average pooling": lambda: make_clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "no projection": lambda: without_projection(make_clip()),
}


def without_projection(model: nn.Module) -> nn.Module:
    model.visual.proj = None
    return model


def classes_for(model: nn.Module, *groups: int) -> Tensor:
    width = 32 if model.visual.proj is None else 16
    return make_class_embeddings(*groups, 5, width)


def linear_table(strength: float = 0.5) -> Tensor:
    return torch.tensor([1.0, *(1 - strength * (count - 3) for count in range(1, 6))])


def plain_attention(attention: nn.MultiheadAttention, tokens: Tensor, weights: Tensor) -> Tensor:
    projected = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)) for part in projected.chunk(3, -1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    terms = weights.clamp(min=0)[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    sums = terms.sum(-1, keepdim=True)
    attended = torch.einsum("bhij,bjhd->bihd", terms / sums.where(sums > 0, 1.0), v)
    return attention.out_proj(attended.flatten(2))


def plain_block(block: nn.Module, tokens: Tensor, weights: Tensor, placement: str) -> Tensor:
    if placement != "attention":
        tokens = weights[..., None] * tokens
    inside = torch.ones_like(weights) if placement == "tokens" else weights
    tokens = tokens + block.ls_1(plain_attention(block.attn, block.ln_1(tokens), inside))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def plain_encode_image(
    model: nn.Module,
    images: Tensor,
    classes: Tensor,
    layers: tuple[int, ...],
    placement: str,
    table: Tensor | None = None,
    top_ratio: float = 0.3,
) -> tuple[Tensor, dict[int, Tensor]]:
    """The re-weighted tower, block by block, and the counts of the re-weighted blocks."""
    tower = model.visual
    table = linear_table() if table is None else table
    tokens = tower._embeds(images)
    all_counts = {}
    for layer, block in enumerate(tower.transformer.resblocks):
        weights = torch.ones(tokens.shape[:2])
        if layer in layers:
            relevance = plain_relevance(tokens.detach(), classes, joint_space(tower), 1)
            counts = pick_counts(relevance, int(16 * top_ratio))
            weights = torch.cat([weights[:, :1], table[counts.long()]], dim=1)
            all_counts[layer] = counts
        tokens = plain_block(block, tokens, weights, placement)
    pooled, _ = tower._pool(tokens)
    return pooled if tower.proj is None else pooled @ tower.proj, all_counts


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
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            scale = expected_grad.abs().max().item()
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
        expected = token_weights(tokens, classes, joint_space=joint_space(model.visual), rule=rule)
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
        ({"placement": "values"}, ValueError, "placement must be one of tokens, attention, both"),
        ({"rule": "loud"}, ValueError, "kind must be one of linear, .*; got 'loud'"),
        ({"rule": 0.5}, TypeError, "rule must be a WeightRule or its kind; got float"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    model = make_clip()
    before = Untouched(model)
    with pytest.raises(kind, match=message):
        adapters.add_reweighting(model, **arguments)
    before.check()


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
    timm_tower = {"timm_model_name": "test_vit", "image_size": 32}
    with pytest.raises(TypeError, match="its tower is TimmModel"):
        adapters.add_reweighting(CLIP(16, timm_tower, TEXT))
    with pytest.raises(ValueError, match="pools its image tokens by attention"):
        adapters.add_reweighting(make_clip({"attentional_pool": True, "attn_pooler_heads": 2}))


@torch.no_grad()
def test_blocks_of_another_kind_take_placement_tokens_only() -> None:
    model = make_clip({"scale_heads": True})
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


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", [True, False])
def test_remove_restores_the_model(variant: str, placement: str, mode: bool) -> None:
    model = VARIANTS[variant]().train(mode)
    before = Untouched(model)
    keys = list(model.state_dict())
    handle = adapters.add_reweighting(model, placement=placement)
    handle.set_class_embeddings(classes_for(model))
    model.encode_image(make_images()).sum().backward()
    assert list(model.state_dict()) == keys
    handle.remove()
    before.check()
    handle.remove()
    before.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_error_inside_the_context_restores_the_model(placement: str) -> None:
    model = make_clip()
    before = Untouched(model)
    with (
        pytest.raises(RuntimeError, match="not set"),
        adapters.add_reweighting(model, placement=placement),
    ):
        model.encode_image(make_images())
    before.check()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_weights_outlive_a_pass(checkpointing: bool) -> None:
    """Neither one that fails inside a block, nor one that is repeated for the gradient."""
    model = make_clip()
    model.set_grad_checkpointing(checkpointing)
    blocks = model.visual.transformer.resblocks
    with adapters.add_reweighting(model, placement="attention") as handle:
        handle.set_class_embeddings(classes_for(model))
        model.encode_image(make_images()).sum().backward()
        assert all(blocks[layer].attn.key_weights is None for layer in handle.layers)

        def fail(*_: Any) -> None:
            raise KeyError

        hook = blocks[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model.encode_image(make_images())
        hook.remove()
        assert blocks[2].attn.key_weights is None


def test_a_forgotten_handle_keeps_no_model_alive() -> None:
    model = make_clip()
    adapters.add_reweighting(model, placement="both")
    tower = weakref.ref(model.visual)
    del model
    gc.collect()
    assert tower() is None


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing(placement: str) -> None:
    model = make_clip()
    outputs, gradients = [], []
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes_for(model))
        for enabled in (False, True):
            model.set_grad_checkpointing(enabled)
            outputs.append(model.encode_image(make_images()))
            loss = outputs[-1].square().sum()
            gradients.append(torch.autograd.grad(loss, list(model.visual.parameters())))
    assert torch.equal(outputs[0], outputs[1])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_autocast(placement: str, dtype: torch.dtype) -> None:
    model = make_clip()
    # Softer weights than the published ones, for rounding turns some selections.
    rule = WeightRule(strength=0.05)
    with adapters.add_reweighting(model, placement=placement, rule=rule) as handle:
        handle.set_class_embeddings(classes_for(model))
        exact = model.encode_image(make_images())
        with torch.autocast("cpu", dtype=dtype):
            handle.set_class_embeddings(classes_for(model).to(dtype))
            found = model.encode_image(make_images())
        assert found.isfinite().all()
        assert torch.cosine_similarity(found.float(), exact, dim=1).min() > 0.99
        found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.visual.parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_models_of_low_precision(placement: str) -> None:
    model = make_clip().bfloat16()
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes_for(model))
        output = model.encode_image(make_images().bfloat16())
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.visual.parameters())


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_models() -> None:
    """One graph for the whole tower, with LoRA in it; the compiler behind it is another matter."""
    model = make_clip({"layers": 2})
    with (
        adapters.add_lora(model, rank=2, towers=["visual"]) as lora,
        adapters.add_reweighting(model, [0, 1], placement="both") as handle,
    ):
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.1)
        compiled = torch.compile(model.visual, backend="aot_eager", fullgraph=True)
        for sign in (1, -1):
            handle.set_class_embeddings(sign * classes_for(model))
            results = []
            for tower in (model.visual, compiled):
                handle.last_counts.clear()
                output = tower(make_images())
                grads = torch.autograd.grad(output.square().sum(), list(lora.parameters()))
                results.append((output, *grads, *handle.last_counts.values()))
            assert len(results[0]) == 1 + 4 + 2
            for plain, fused in zip(*results, strict=True):
                torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("placement", ["tokens", "attention"])
@torch.no_grad()
def test_what_was_compiled_before_notices(placement: str) -> None:
    model, images = make_clip({"layers": 2}), make_images()
    compiled = torch.compile(model.visual, backend="eager")
    plain = compiled(images)
    with adapters.add_reweighting(model, [0], placement) as handle:
        handle.set_class_embeddings(classes_for(model))
        reweighted = model.visual(images)
        assert (reweighted - plain).abs().max() > 1e-3
        torch.testing.assert_close(compiled(images), reweighted)
    torch.testing.assert_close(compiled(images), plain)


@torch.no_grad()
def test_installing_on_the_image_tower_itself() -> None:
    model = make_clip()
    expected, _ = plain_encode_image(model, make_images(), classes_for(model), (2, 4), "both")
    with adapters.add_reweighting(model.visual, placement="both") as handle:
        handle.set_class_embeddings(classes_for(model))
        torch.testing.assert_close(model.visual(make_images()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropped_patches() -> None:
    """Tokens are as many as the tower left over."""
    model = make_clip({"patch_dropout": 0.5}).train()
    with adapters.add_reweighting(model, placement="both") as handle:
        handle.set_class_embeddings(classes_for(model))
        assert model.encode_image(make_images()).isfinite().all()
        assert handle.last_counts[2].shape == (4, 8)


@torch.no_grad()
def test_an_empty_batch() -> None:
    model = make_clip()
    for placement in PLACEMENTS:
        with adapters.add_reweighting(model, placement=placement) as handle:
            handle.set_class_embeddings(classes_for(model))
            assert model.visual.transformer(torch.empty(0, 17, 32)).shape == (0, 17, 32)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_deep_copy_stands_on_its_own(placement: str) -> None:
    model = make_clip()
    images, classes = make_images(), classes_for(model)
    with adapters.add_reweighting(model, placement=placement) as handle:
        handle.set_class_embeddings(classes)
        again = copy.deepcopy(model)
        handle.set_class_embeddings(-classes)
        for parameter in model.parameters():
            parameter.zero_()
        expected, _ = plain_encode_image(make_clip(), images, classes, (2, 4), placement)
        torch.testing.assert_close(again.encode_image(images), expected, rtol=1e-4, atol=1e-5)
        assert handle.last_counts == {}
        with pytest.raises(RuntimeError, match="re-weighted already"):
            adapters.add_reweighting(again)


def test_a_forward_of_another_tool_is_kept() -> None:
    model = make_clip()
    block = model.visual.transformer.resblocks[2]
    plain_forward = block.forward
    calls = []

    def watched(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments)
        return plain_forward(*arguments, **options)

    block.forward = watched
    with adapters.add_reweighting(model) as handle:
        handle.set_class_embeddings(classes_for(model))
        model.encode_image(make_images())
    assert len(calls) == 1
    assert block.forward is watched


def test_a_saved_copy_is_one_of_a_model_never_touched() -> None:
    model, other = make_clip(), make_clip()
    with adapters.add_reweighting(model, placement="both") as handle:
        handle.set_class_embeddings(classes_for(model))
        model.encode_image(make_images())
    again = copy.deepcopy(model)
    for (key, value), (other_key, other_value) in zip(
        again.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(value, other_value)
