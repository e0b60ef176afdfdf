"""The cases that compute-sanitizer watches, on the CPU: what they compare, and what they notice."""

from __future__ import annotations

import pytest
import torch

from bench import sanitizer_cases
from bench.backward_launches import backward_plan
from tir_kernels.operators import attending
from tir_kernels.operators.choose import load_backend
from tir_kernels.operators.known_calls import KnownCalls

SHAPES = {
    sanitizer_cases.run_attention: sanitizer_cases.ATTENTION_SHAPES[0],
    sanitizer_cases.run_whole: (*sanitizer_cases.WHOLE_SHAPES[1], 96, 48, 5),
}
NAMES = {
    sanitizer_cases.run_attention: "attention_backward",
    sanitizer_cases.run_whole: "token_weights",
}


@pytest.fixture(autouse=True)
def needs_cpu_kernels() -> None:
    if reason := load_backend("cpu").unavailable():
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", sanitizer_cases.DTYPES)
@pytest.mark.parametrize("run", SHAPES)
def test_right_results_pass_and_wrong_ones_do_not(run, dtype, monkeypatch) -> None:
    pairs = run("cpu", SHAPES[run], dtype, "cpu")
    sanitizer_cases.compare("cpu", pairs, dtype)

    def of_another_problem(*arguments):
        return [2 * result for result in getattr(load_backend("reference"), NAMES[run])(*arguments)]

    monkeypatch.setattr(load_backend("cpu"), NAMES[run], of_another_problem)
    # Gradients of a call like one before come from a launch that is remembered.
    monkeypatch.setattr(attending, "_known_gradients", KnownCalls())
    with pytest.raises(AssertionError, match="case: off by"):
        sanitizer_cases.compare("case", run("cpu", SHAPES[run], dtype, "cpu"), dtype)


def test_there_are_blocks_of_four_warps_for_wide_heads() -> None:
    for batch, heads, length, width in sanitizer_cases.FOUR_WARPS:
        rows = 32 * 4 if width <= 80 else 16 * 4
        assert batch * heads * (length // rows) >= 132
    assert any(length > 564 and width > 64 for *_, length, width in sanitizer_cases.FOUR_WARPS)


def test_there_are_blocks_of_whole_heads() -> None:
    narrow = (sanitizer_cases.FOUR_WARPS[0], sanitizer_cases.TWO_SWEEPS)
    for shapes, widest in ((narrow, 64), (sanitizer_cases.WIDE_HEADS, 80)):
        for sweeps, (batch, heads, length, width) in enumerate(shapes, 1):
            assert widest - 16 < width <= widest
            assert backward_plan(length, batch * heads, 132, 227 * 1024, width).sweeps == sweeps


def test_backends_that_are_not_there_are_refused(monkeypatch, capsys) -> None:
    assert sanitizer_cases.main(["cdua"]) == 2
    assert "'cdua' is none of cuda, triton" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitizer_cases.main(["cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
