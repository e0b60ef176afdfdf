"""Blocks that add, normalise and convert in one operator: the same numbers in fewer passes."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_clip import OWN_BLOCKS, Untouched, make_clip, make_images, make_token_ids
from torch import Tensor, nn

from tir_kernels import towers
from tir_kernels.adapters import add_lora, add_reweighting
from tir_kernels.operators.add_norm import add_norm
from tir_kernels.towers import frozen_norms, norms


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Norms are fused on a CPU too; the type of each result that was."""
    seen: list[Any] = []

    def spy(hidden: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        results = add_norm(hidden, *rest, **options)
        seen.append(results[1].dtype)
        return results

    monkeypatch.setattr(norms, "are_fused", lambda hidden: True)
    monkeypatch.setattr(norms, "add_norm", spy)
    return seen


def adapted(model: nn.Module, placement: str | None = None) -> nn.Module:
    """A frozen model with LoRA that does something, and re-weighting in a placement."""
    model.requires_grad_(False)
    lora = add_lora(model, rank=2, passes_input_gradient=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in lora.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if placement is not None:
        handle = add_reweighting(model, placement=placement)
        handle.set_class_embeddings(torch.randn(4, 16, generator=generator))
    return model


def results(model: Any, dtype: torch.dtype, is_fused: bool) -> list[Tensor]:
    """Features of images and texts in an autocast region, and LoRA's gradients."""
    encoder, text, ids = towers.ImageEncoder(model), towers.text_tower(model), make_token_ids()
    tokens = encoder.embed(make_images(3).to(next(model.parameters()).dtype))
    region = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
    with frozen_norms(model) if is_fused else nullcontext(), region:
        found = [encoder.features(tokens), encoder.features(tokens.to(dtype))]
        found += text.encode(text.embed(ids), text.last_position(ids), layer=1)
        score = sum(each.double().square().sum() for each in found)
        learned = [p for p in model.parameters() if p.requires_grad]
        return [*found, *torch.autograd.grad(score, learned)]


@pytest.mark.parametrize("placement", [None, "tokens", "attention"])
def test_results_are_those_without(fused: list[Any], placement: str | None) -> None:
    model = adapted(make_clip(), placement).double()
    before = Untouched(model)
    ours = results(model, torch.float64, True)
    before.check()
    assert Counter(fused) == {torch.float64: 2 * (6 + 6 + 3)}  # two passes of images, one of texts
    for one, other in zip(ours, results(model, torch.float64, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert len(fused) == 30


def test_in_16_bits_the_error_is_that_without(fused: list[Any]) -> None:
    model = adapted(make_clip())
    exact = results(model, torch.float32, False)
    ours, theirs = (results(model, torch.bfloat16, is_fused) for is_fused in (True, False))
    assert set(fused) == {torch.bfloat16}
    for one, other, expected in zip(ours, theirs, exact, strict=True):
        rounding = torch.finfo(torch.bfloat16).eps * expected.abs().max()
        assert (one - expected).abs().max() <= 2 * (other - expected).abs().max() + rounding


def test_norms_that_learn_or_have_hooks_run_as_ever(fused: list[Any]) -> None:
    model = make_clip().requires_grad_(False)
    first, second, third, *_ = model.visual.transformer.resblocks
    first.ln_1.weight.requires_grad_()
    seen: list[Tensor] = []
    second.ln_2.register_forward_hook(lambda norm, inputs, output: seen.append(output))
    third.register_forward_hook(lambda block, inputs, output: seen.append(output))
    encoder = towers.ImageEncoder(model)
    tokens = encoder.embed(make_images(2))
    expected = encoder.features(tokens)
    assert len(seen) == 2
    with towers.opened_attention(model), frozen_norms(model):
        torch.testing.assert_close(encoder.features(tokens), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 4
    assert len(fused) == 2 * 3  # of three blocks; the others are open_clip's own


def test_blocks_of_another_kind_run_as_ever(fused: list[Any]) -> None:
    model = adapted(make_clip(OWN_BLOCKS, OWN_BLOCKS))
    ours = results(model, torch.float32, True)
    for one, other in zip(ours, results(model, torch.float32, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_on_a_cpu_nothing_changes() -> None:
    model = make_clip().requires_grad_(False)
    kinds = [type(module) for module in model.modules()]
    with frozen_norms(model):
        assert [type(module) for module in model.modules()] == kinds


@pytest.mark.gpu
def test_a_gpu_computes_what_a_cpu_does() -> None:
    model = adapted(make_clip())
    expected = results(model, torch.float32, False)
    model.cuda()
    encoder = towers.ImageEncoder(model)
    with frozen_norms(model):
        assert norms.are_opened(model.visual.transformer.resblocks[0].ln_1)
        found = encoder.features(encoder.embed(make_images(3).cuda()))
    torch.testing.assert_close(found.cpu(), expected[0], rtol=1e-3, atol=1e-4)
