"""Kernels that a step launches on a GPU, counted on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from fewshot.training_cases import EPISODES, METHOD, assert_same, make_tokenizer, steady_model
from torch import Tensor

from bench.step_kernels import Count, KernelCounter, as_on_a_gpu, count_step, main
from tir_kernels.fewshot import EpisodeResult, finetune_episodes
from tir_kernels.fewshot.methods.tir import TIR

BUDGET = 772  # kernels of a step of ViT-B/16 in bfloat16, placement "tokens"


@pytest.fixture(scope="module", name="step")
def _step() -> Count:
    return count_step()


def test_a_step_stays_within_its_budget(step: Count) -> None:
    assert step.total <= BUDGET, step.by_operator().most_common()


def test_the_budget_is_what_a_step_needs(step: Count) -> None:
    """Or a later change could eat up what was saved unseen."""
    assert step.total > 0.98 * BUDGET


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("placement", ["tokens", "attention"])
def test_the_path_that_is_counted_trains_as_the_other_does(placement: str, dropout: float) -> None:
    method = replace(METHOD, lora_dropout=dropout, placement=placement)

    def train(path: AbstractContextManager[None]) -> list[EpisodeResult]:
        with path:
            return finetune_episodes(steady_model(method), make_tokenizer(), EPISODES, method)

    for ours, theirs in zip(train(as_on_a_gpu()), train(nullcontext()), strict=True):
        assert_same(ours, theirs)


def test_all_of_the_step_is_counted(step: Count) -> None:
    """Of 12 + 12 blocks, the first of which lets no gradient through to frozen inputs."""
    found = step.by_operator()
    assert found["gelu"] == found["gelu_backward"] == 24
    assert step.of("update") == 4  # two kinds of optimizers, and AdamW's count of steps
    assert found["add_norm"] == 48
    assert step.of("forward") > 0
    assert step.total == sum(map(step.of, ("forward", "backward", "update")))


def test_a_deeper_model_launches_more_of_the_same() -> None:
    method = TIR(steps=2, logit_scale=4.0)
    one, two, three = (count_step((each, 4), method).total for each in (6, 7, 8))
    assert three - two == two - one > 0


def counted(call) -> dict[str, int]:
    counter = KernelCounter()
    with counter:
        call()
    return {key.operator: number for key, number in counter.kernels.items()}


def test_views_and_allocations_are_free() -> None:
    rows = torch.zeros(4, 6)
    assert counted(lambda: rows.view(2, 12)[1:].t().detach()) == {}
    assert counted(lambda: torch.empty(3).new_empty(2)) == {}


def test_a_copy_is_not_free() -> None:
    rows = torch.zeros(4, 6)
    assert counted(lambda: rows.t().reshape(24)) == {"clone": 1}
    assert counted(lambda: rows.bfloat16()) == {"_to_copy": 1}
    assert counted(lambda: rows.float()) == {}


@pytest.mark.parametrize(("tensors", "launches"), [(36, 1), (37, 2), (72, 2)])
def test_a_fused_optimizer_launches_by_lists(tensors: int, launches: int) -> None:
    parameters = [torch.zeros(3, requires_grad=True) for _ in range(tensors)]
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def update() -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    update()
    assert counted(optimizer.step)["_fused_adamw_"] == launches


def test_a_backward_pass_counts_too() -> None:
    rows: Tensor = torch.zeros(4, 6, requires_grad=True)
    counter = KernelCounter()
    with counter:
        rows.exp().backward(torch.ones(4, 6))
    assert {(key.step_pass, key.operator) for key in counter.kernels} >= {
        ("forward", "exp"),
        ("backward", "mul"),
    }


def test_the_command_prints_the_table() -> None:
    result = CliRunner().invoke(main, ["--precision", "float32"])
    assert result.exit_code == 0, result.output
    assert "addmm" in result.output
    assert "all" in result.output
