"""The engine's savings are exact, and save: parts of it are swapped for wasteful ones."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from fewshot.training_cases import (
    EPISODES,
    METHOD,
    NAMES,
    assert_same,
    draw_episode,
    make_model,
    make_tokenizer,
    steady_model,
)
from tiny_clip import Untouched
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.without import SAVINGS, without
from tir_kernels.fewshot import Runtime, finetune_episodes
from tir_kernels.fewshot.methods import Method
from tir_kernels.towers import products

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", name="model")
def _model() -> nn.Module:
    return make_model()


# What a saving leaves out are products or, with "image_batches", passes; the others are fused
# layers, packed matrices and, on a GPU, launches.
OTHER_FORMS = ["image_batches", "fused_layers", "packed_matrices"]
LESS_WORK = [
    "cache_patch_embedding",
    "class_token_only",
    "cut_prompts",
    "low_rank_products",
    "frozen_weights",
    "shared_text_pass",
]


@pytest.fixture(autouse=True)
def _packing_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of float32 are packed whatever the processor."""
    can_pack = products.can_pack()
    monkeypatch.setattr(products, "is_faster", lambda dtype: can_pack and dtype == torch.float32)


@functools.cache
def usual_results(method: Method) -> list[Any]:
    return finetune_episodes(steady_model(method), make_tokenizer(), EPISODES, method)


@pytest.mark.parametrize("switched_off", [*LESS_WORK, *OTHER_FORMS])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_savings_are_exact(switched_off: str, dropout: float) -> None:
    method = replace(METHOD, lora_dropout=dropout)
    model = steady_model(method)
    untouched = Untouched(model)
    with without(method, switched_off) as wasteful:
        whole = finetune_episodes(model, make_tokenizer(), EPISODES, wasteful)
    untouched.check()
    for ours, theirs in zip(usual_results(method), whole, strict=True):
        assert_same(ours, theirs)


def test_every_saving_has_a_test() -> None:
    tested = {*LESS_WORK, *OTHER_FORMS, "step_graph"}
    assert tested == set(SAVINGS)


@pytest.mark.parametrize("switched_off", LESS_WORK)
def test_savings_save(model, switched_off: str) -> None:
    def operations(*savings: str) -> int:
        method = replace(METHOD, steps=2, lora_rank=4)
        # More than one batch of images: only then are there text passes to share.
        episode = draw_episode(0, NAMES[0], queries=30)
        # The fused layers multiply where the counter does not see it.
        with (
            without(method, "fused_layers", *savings) as method,
            FlopCounterMode(display=False) as counter,
        ):
            finetune_episodes(model, make_tokenizer(), [episode], method)
        return counter.get_total_flops()

    assert operations() < operations(switched_off)


def test_images_are_classified_in_batches(model) -> None:
    sizes = []
    handle = model.visual.conv1.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output))
    )
    try:
        for savings in ((), ("image_batches",)):
            with without(replace(METHOD, steps=1), *savings) as method:
                finetune_episodes(model, make_tokenizer(), EPISODES[:2], method)
    finally:
        handle.remove()
    training, support, queries = 12, 12, 18
    assert sizes == [training, support, queries] + [training] + [2] * ((support + queries) // 2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_graph_of_the_step_changes_nothing(model, precision: str) -> None:
    model = copy.deepcopy(model).cuda()
    method = replace(METHOD, lora_dropout=0.25)
    runtime = Runtime(device="cuda", precision=precision)
    heard: list[tuple[int, int, float]] = []
    graphed = finetune_episodes(
        model,
        make_tokenizer(),
        EPISODES,
        method,
        runtime=runtime,
        on_step=lambda *step: heard.append(step),
    )
    with without(method, "step_graph") as ungraphed:
        plain = finetune_episodes(model, make_tokenizer(), EPISODES, ungraphed, runtime=runtime)
    for one, other in zip(graphed, plain, strict=True):
        assert_same(one, other, atol=1e-4 if precision == "float32" else 1e-2)
    assert sorted(heard) == sorted(
        (position, step, loss)
        for position, result in enumerate(graphed)
        for step, loss in enumerate(result.losses)
    )


@pytest.mark.parametrize("frozen_weights", [True, False])
def test_a_users_gradients_are_left_alone(model, frozen_weights: bool) -> None:
    model = copy.deepcopy(model)
    weight = model.visual.proj
    weight.grad = gradient = torch.ones_like(weight)
    savings = () if frozen_weights else ("frozen_weights",)
    with without(replace(METHOD, steps=2), *savings) as method:
        finetune_episodes(model, make_tokenizer(), EPISODES[:1], method)
    assert weight.grad is gradient
    assert (gradient == 1).all()
    assert all(p.grad is None for p in model.parameters() if p is not weight)
