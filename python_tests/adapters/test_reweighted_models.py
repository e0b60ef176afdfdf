"""Re-weighted models in use: removal, precision, compilers, copies and other tools."""

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reweighted_tower import PLACEMENTS, VARIANTS, classes_for, plain_encode_image
from tiny_clip import ATTENTION_POOL, OWN_BLOCKS, Untouched, make_clip, make_images
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tir_kernels import WeightRule, adapters


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


def attributes(model: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (place, name): id(value)
        for place, module in model.named_modules()
        for name, value in vars(module).items()
    }


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_weights_outlive_a_pass(checkpointing: bool) -> None:
    """Neither one that fails inside a block, nor one that is repeated for the gradient."""
    model = make_clip()
    model.set_grad_checkpointing(checkpointing)
    blocks = model.visual.transformer.resblocks
    with adapters.add_reweighting(model, placement="attention") as handle:
        handle.set_class_embeddings(classes_for(model))
        before = attributes(model)
        model.encode_image(make_images()).sum().backward()
        assert attributes(model) == before

        def fail(*_: Any) -> None:
            raise KeyError

        hook = blocks[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model.encode_image(make_images())
        hook.remove()
        assert attributes(model) == before


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
@pytest.mark.parametrize(
    ("placement", "options"),
    [
        *((placement, {}) for placement in PLACEMENTS),
        ("tokens", ATTENTION_POOL),
        ("attention", {**ATTENTION_POOL, **OWN_BLOCKS}),
    ],
)
def test_compiled_models(placement: str, options: dict[str, Any]) -> None:
    """One graph for the whole tower, with LoRA in it; the compiler behind it is another matter."""
    model = make_clip({"layers": 2, **options})
    with (
        adapters.add_lora(model, rank=2, towers=["visual"]) as lora,
        adapters.add_reweighting(model, [0, 1], placement) as handle,
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


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("placement", PLACEMENTS)
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


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_export_leaves_nothing_behind(placement: str, strict: bool) -> None:
    model, images = make_clip({"layers": 2}), make_images()
    with adapters.add_reweighting(model, [0], placement) as handle:
        handle.set_class_embeddings(classes_for(model))
        expected = model.visual(images)
        counts = dict(handle.last_counts)
        program = torch.export.export(model.visual, (images,), strict=strict)
        assert handle.last_counts.keys() == counts.keys()
        assert handle.last_counts[0] is counts[0]
    torch.testing.assert_close(program.module()(images), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_fake_tensors_leave_nothing_behind(placement: str) -> None:
    model = make_clip({"layers": 2})
    with adapters.add_reweighting(model, [0], placement) as handle:
        handle.set_class_embeddings(classes_for(model))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = model.visual(mode.from_tensor(make_images()))
        assert output.shape == (4, 16)
        assert handle.last_counts == {}


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
