"""Attention statistics of the Triton backend against float64, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_cases import BACKEND, DTYPES, attention_inputs, run_statistics

from tir_kernels.backends.inputs import StatisticsInputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "head_dim"), [(70, 17), (130, 64)])
def test_statistics(length: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    run_statistics(1, 2, length, head_dim, dtype, device)


@pytest.mark.parametrize("head_dim", [3, 80, 96, 160, 256])
def test_statistics_of_every_head_dim(head_dim: int, device: str) -> None:
    run_statistics(1, 1, 20, head_dim, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("length", [50, 197, 577, 1100])
def test_statistics_on_gpu(length: int, head_dim: int, dtype: torch.dtype, cuda: str) -> None:
    run_statistics(2, 3, length, head_dim, dtype, cuda)


@pytest.mark.gpu
def test_statistics_of_many_heads_and_long_rows(cuda: str) -> None:
    run_statistics(1, 2, 4096, 64, torch.bfloat16, cuda)
    run_statistics(70_000, 1, 5, 16, torch.float32, cuda)


@pytest.mark.gpu
def test_current_stream_is_used(cuda: str) -> None:
    query, key, *_, weights = attention_inputs(2, 2, 197, 64, torch.float32, cuda)
    inputs = StatisticsInputs(query, key, weights, 0.125, 1)
    expected = BACKEND.attention_statistics(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        query.mul_(2.0)
        query.mul_(0.5)
        results = BACKEND.attention_statistics(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, results, expected))
