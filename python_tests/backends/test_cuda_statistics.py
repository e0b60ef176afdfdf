"""The CUDA kernels of attention statistics, emulated: what test_attention_statistics.py does not
reach. Blocks of fewer warps, rows off boundaries, any order of threads, and what is written.
"""

from __future__ import annotations

import cuda_emulation
import pytest
import statistics_oracle
import torch
from torch import Tensor

from tir_kernels import AttentionStatistics
from tir_kernels.backends.inputs import StatisticsInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "runs"),
    pytest.mark.slow,
]


def draw(length: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of one head as views of a packed projection, and weights of every kind."""
    generator = torch.Generator().manual_seed(length + width)
    packed = torch.randn(1, length, 2, 1, width, generator=generator).to(dtype)
    weights = torch.rand(1, length, generator=generator) * 2
    weights[:, ::5], weights[:, 3::7] = 0.0, -1.0
    query, key = packed.permute(2, 0, 3, 1, 4)
    return query, key, weights


def run(query: Tensor, key: Tensor, weights: Tensor | None, prefix: int = 1) -> AttentionStatistics:
    inputs = StatisticsInputs(query, key, weights, query.shape[3] ** -0.5, prefix)
    return cuda_emulation.register().attention_statistics(inputs)


def check(query: Tensor, key: Tensor, weights: Tensor | None, prefix: int = 1) -> None:
    found = run(query, key, weights, prefix)
    scale = query.shape[3] ** -0.5
    statistics_oracle.assert_statistics_as_accurate(found, query, key, weights, prefix, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_the_number_of_warps_changes_no_bit(kernels, width: int, dtype: torch.dtype) -> None:
    """Little shared memory leaves room for one warp's rows, where 150 rows are enough for four."""
    inputs = draw(150, width, dtype)
    expected = run(*inputs)
    element = dtype.itemsize
    pitch = (width + 16 // element) * element
    for warps in (1, 2, 3):
        rows = warps * (16 if dtype == torch.float32 else 32) + 64
        kernels.set_device(4, 160 * 8 + rows * pitch)
        assert all(map(torch.equal, run(*inputs), expected))
    kernels.set_device(4, 4096)
    with pytest.raises(RuntimeError, match="too little shared memory for rows this long"):
        run(*inputs)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(kernels, order: int) -> None:
    inputs = [draw(75, 64, dtype) for dtype in (torch.bfloat16, torch.float32)]
    kernels.set_thread_order(0)
    expected = [run(*each) for each in inputs]
    kernels.set_thread_order(order)
    for each, before in zip(inputs, expected, strict=True):
        assert all(map(torch.equal, run(*each), before))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [72, 20])
def test_rows_off_16_byte_boundaries(kernels, width: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(5)
    storage = torch.randn(2, 1, 2, 40, width + 5, generator=generator)
    weights = torch.rand(1, 40, generator=generator)
    for dtype in DTYPES:
        query, key = storage.to(dtype)[..., offset : offset + width]
        check(query, key, weights, prefix=3)


@pytest.mark.parametrize("prefix", [0, 1, 31, 32, 33, 65])
def test_prefix_tokens_end_anywhere_in_a_chunk(kernels, prefix: int) -> None:
    check(*draw(65, 16, torch.bfloat16), prefix)


def test_nothing_of_the_matrix_is_written(kernels, monkeypatch) -> None:
    """Four results of a number a row, and two numbers of each row's softmax."""
    made = cuda_emulation.shapes_made(monkeypatch)
    run(*draw(40, 64, torch.float32))
    assert sorted(made) == [*4 * [(1, 1, 40)], (1, 1, 40, 2)]
