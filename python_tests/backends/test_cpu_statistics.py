"""Attention statistics of the CPU backend, on every instruction set that the machine has."""

from __future__ import annotations

import functools
import threading

import pytest
import statistics_oracle
import torch
from attention_cases import mixed_weights, packed_heads

from tir_kernels.backends import common, cpu
from tir_kernels.backends.inputs import StatisticsInputs
from tir_kernels.backends.protocol import AttentionStatistics
from tir_kernels.operators.choose import load_backend

CPU = load_backend("cpu")

pytestmark = [
    pytest.mark.skipif(CPU.unavailable() != "", reason=CPU.unavailable() or "runs here"),
    pytest.mark.usefixtures("keep_thread_count"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [  # B, H, L, d, P
    (2, 3, 1, 64, 1),
    (2, 2, 7, 5, 0),
    (1, 2, 50, 72, 1),
    (2, 2, 197, 64, 5),
    (1, 2, 257, 80, 257),
    (1, 1, 700, 16, 49),  # several blocks of keys; prefix tokens in two tiles of queries
    (2, 1, 64, 128, 48),
    (1, 1, 33, 255, 3),
    (1, 1, 49, 1, 48),
]


@functools.lru_cache(maxsize=64)  # shared by the instruction sets
def problem(
    shape: tuple[int, ...], dtype: torch.dtype, is_weighted: bool = True
) -> StatisticsInputs:
    torch.manual_seed(0)
    *sizes, num_prefix_tokens = shape
    query, key, _ = packed_heads(*sizes, dtype)
    weights = mixed_weights(sizes[0], sizes[2]) if is_weighted else None
    if is_weighted:
        weights[1:2] = 0
    return StatisticsInputs(query, key, weights, sizes[3] ** -0.5, num_prefix_tokens)


def assert_equal(ours: AttentionStatistics, expected: AttentionStatistics, where: str = "") -> None:
    for name, one, other in zip(AttentionStatistics._fields, ours, expected, strict=True):
        assert torch.equal(one, other), f"{name} {where}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_error_is_bounded_by_plain_pytorch(
    architecture: str, is_weighted: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = problem(shape, dtype, is_weighted)
    query, key, weights, scale, num_prefix_tokens, _ = inputs
    statistics_oracle.assert_statistics_as_accurate(
        CPU.attention_statistics(inputs), query, key, weights, num_prefix_tokens, scale
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 197, 64, 1), (1, 3, 50, 80, 5), (2, 5, 130, 32, 0), (1, 1, 1400, 64, 60)]
)
def test_thread_count_changes_no_bit(
    architecture: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = problem(shape, dtype)
    torch.set_num_threads(1)
    expected = CPU.attention_statistics(inputs)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert_equal(CPU.attention_statistics(inputs), expected, f"with {threads} threads")


@pytest.mark.parametrize("shape", [(2, 2, 1, 1, 1), (2, 2, 31, 33, 0), (2, 2, 700, 64, 1)])
def test_every_element_is_written(architecture: str, shape: tuple[int, ...]) -> None:
    inputs = problem(shape, torch.float32)
    expected = CPU.attention_statistics(inputs)
    assert not any(t.isnan().any() for t in expected)
    query, key, weights, _, num_prefix_tokens, _ = inputs
    for threads in (1, 7):  # the two ways to cut the work
        poisoned = AttentionStatistics(*(torch.full_like(t, torch.nan) for t in expected))
        cpu._kernels().attention_statistics(
            *common.attention_problem(inputs), common.row_grid(query), common.row_grid(key),
            weights.data_ptr(), num_prefix_tokens, *(t.data_ptr() for t in poisoned), threads,
        )  # fmt: skip
        assert_equal(poisoned, expected, f"with {threads} threads")


def test_strides_do_not_matter(architecture: str) -> None:
    query, key, _ = packed_heads(2, 3, 60, 64, torch.float32)
    key = key[:, :1].expand(2, 3, 60, 64)  # stride 0
    query = query.repeat_interleave(2, 2)[:, :, ::2]
    strided = StatisticsInputs(query, key, torch.rand(60, 2).mT, 0.125, 1)
    dense = StatisticsInputs(*(t.contiguous() for t in strided[:3]), 0.125, 1)
    assert_equal(CPU.attention_statistics(strided), CPU.attention_statistics(dense))


def test_scores_so_far_apart_that_their_distance_overflows(architecture: str) -> None:
    """The first block of keys has vanished when the second one's maximum is found."""
    query = torch.full((1, 1, 3, 1), 1e19)
    key = torch.full((1, 1, 1300, 1), -1e19)
    key[0, 0, 1000] = 1e19
    inputs = StatisticsInputs(query.repeat(1, 1, 434, 1)[:, :, :1300], key, None, 2.0, 1)
    found = CPU.attention_statistics(inputs)
    assert (found.entropy == 0).all()
    assert (found.received_from_patches[0, 0, 1000] == 1).all()
    assert found.received_from_patches.sum() == 1


def test_several_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    inputs = problem((2, 4, 197, 64, 1), torch.float32)
    expected = CPU.attention_statistics(inputs)
    results: list[AttentionStatistics] = []

    def call() -> None:
        results.append(CPU.attention_statistics(inputs))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert len(results) == 4
    for found in results:
        assert_equal(found, expected)


@pytest.mark.slow
def test_no_matrix_is_written(architecture: str) -> None:
    """A tile of scores is all that a worker keeps: 16384 tokens have a matrix of 1 GiB."""
    import resource

    if "emulated" in architecture:
        pytest.skip("takes a minute, and its memory is that of the other instruction sets")
    query, key, _ = packed_heads(1, 1, 16384, 1, torch.float32)
    inputs = StatisticsInputs(query, key, None, 1.0, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = CPU.attention_statistics(inputs)
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert added < query.shape[2] ** 2  # bytes: a quarter of the matrix
    torch.testing.assert_close(found.received_from_patches.sum(), torch.tensor(1.0))
