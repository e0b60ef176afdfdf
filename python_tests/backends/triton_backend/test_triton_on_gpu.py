"""Attention and its statistics of the Triton backend at the sizes and on the streams of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from triton_cases import (
    BACKEND,
    DTYPES,
    attention_inputs,
    check_attention,
    run_attention,
    run_statistics,
)

from tir_kernels.backends.inputs import StatisticsInputs

pytestmark = pytest.mark.gpu

any_operation = pytest.mark.parametrize("check", [check_attention, run_statistics])


@any_operation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 88, 96, 104, 112, 128, 256])
@pytest.mark.parametrize("length", [50, 197, 257, 577, 1100])
def test_every_size(
    check: Callable[..., object], length: int, head_dim: int, dtype: torch.dtype, cuda: str
) -> None:
    check(2, 3, length, head_dim, dtype, cuda)


@any_operation
def test_many_heads_and_long_rows(check: Callable[..., object], cuda: str) -> None:
    check(1, 2, 4096, 64, torch.bfloat16, cuda)
    check(70_000, 1, 5, 16, torch.float32, cuda)


def run_statistics_of(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> Iterable[Tensor]:
    return BACKEND.attention_statistics(StatisticsInputs(query, key, weights, scale, 1))


@pytest.mark.parametrize("run", [run_attention, run_statistics_of])
def test_current_stream_is_used(run: Callable[..., Iterable[Tensor]], cuda: str) -> None:
    inputs = attention_inputs(2, 2, 197, 64, torch.float32, cuda)
    expected = run(*inputs, 0.125)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        inputs[0].mul_(2.0)
        inputs[0].mul_(0.5)
        results = run(*inputs, 0.125)
    torch.cuda.current_stream().wait_stream(stream)
    for ours, other in zip(results, expected, strict=True):
        assert torch.equal(ours, other)
