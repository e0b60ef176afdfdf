"""Weighted attention of the CPU backend, on every instruction set that the machine has."""

from __future__ import annotations

import oracle
import pytest
import torch
from attention_cases import (
    RESULTS,
    assert_attention_is_accurate,
    attention_case,
    mixed_weights,
    packed_heads,
    run_attention,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_queries_and_causality import check
from torch import Tensor

from tir_kernels.backends import common, cpu
from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators.choose import load_backend

CPU = load_backend("cpu")

pytestmark = [
    pytest.mark.skipif(CPU.unavailable() != "", reason=CPU.unavailable() or "runs here"),
    pytest.mark.usefixtures("keep_thread_count"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (2, 3, 1, 64),
    (2, 2, 7, 5),
    (1, 2, 50, 72),
    (2, 2, 197, 64),
    (1, 2, 257, 80),
    (1, 1, 389, 88),
    (1, 1, 700, 16),  # several blocks of keys
    (2, 1, 64, 128),
    (1, 1, 33, 255),
    (1, 1, 49, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_error_is_bounded_by_plain_pytorch(
    architecture: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_attention_is_accurate(attention_case(shape, dtype, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 6, 50, 420])
def test_zero_and_negative_weights(architecture: str, length: int, dtype: torch.dtype) -> None:
    case = attention_case((3, 1, length, 64), dtype, True)
    assert_attention_is_accurate(case)
    results, weights = run_attention(*case.inputs), case.inputs[3]
    # Nothing is attended to: exactly zero, not nearly.
    for name, ours in zip(RESULTS, results, strict=True):
        empty = torch.full_like(ours[1:], -torch.inf if name == "log_sum_exp" else 0)
        assert torch.equal(ours[1:], empty), name
    ignored = (weights <= 0)[:, None, :]
    assert not results[3][ignored].any()
    assert not results[4][ignored].any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("width", [1, 20, 64, 136])
def test_few_queries(architecture: str, width: int, is_causal: bool) -> None:
    for num_queries in (1, 2, 3, 4, 5):
        for num_keys in (1, 50, 403):
            check("cpu", "cpu", (num_queries, num_keys), width, is_causal)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [5, 12])
def test_few_queries_of_many_heads(architecture: str, num_heads: int, dtype: torch.dtype) -> None:
    """Heads that are worked on together, of which the last group has fewer."""
    torch.manual_seed(num_heads)
    for num_queries, num_keys, threads in [(1, 197, 1), (2, 90, 2), (1, 33, 2)]:
        torch.set_num_threads(threads)
        qkv = torch.randn(4, num_keys, 3, num_heads, 40).to(dtype)  # heads side by side
        _, key, value = qkv.permute(2, 0, 3, 1, 4)
        query = torch.randn(4, num_heads, num_queries, 40).to(dtype)
        grad_output = torch.randn_like(query)
        weights = mixed_weights(4, num_keys)
        weights[2] = 0
        inputs = AttentionInputs(query, key, value, weights, 0.1)
        output, _, *gradients = oracle.run_attention(CPU, inputs, grad_output)
        oracle.assert_attention_as_accurate(
            (output, *gradients), query, key, value, weights, 0.1, grad_output
        )


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(450, 900), (1, 390), (2, 70), (201, 61), (61, 70)], ids=str)
def test_attended_keys_side_by_side(
    architecture: str, shape: tuple[int, int], is_causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    num_queries, num_keys = shape
    query, key, value = (torch.randn(1, 2, n, 72).to(dtype) for n in (num_queries, *[num_keys] * 2))
    grad_output = torch.randn(1, 2, num_queries, 72).to(dtype)
    for ignored in (slice(0), slice(5), slice(num_keys - 7, None)):
        weights = torch.rand(1, num_keys) + 0.5
        weights[:, ignored] = 0
        inputs = AttentionInputs(query, key, value, weights, 0.1, is_causal)
        output, _, *gradients = oracle.run_attention(CPU, inputs, grad_output)
        oracle.assert_attention_as_accurate(
            (output, *gradients), query, key, value, weights, 0.1, grad_output, is_causal
        )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_keys_and_values_leave_no_trace(
    architecture: str, dtype: torch.dtype, poison: float
) -> None:
    query, key, value = (t.contiguous() for t in packed_heads(2, 2, 61, 64, dtype))
    weights = mixed_weights(2, 61)
    grad_output = torch.randn(2, 2, 61, 64).to(dtype)
    clean = run_attention(query, key, value, weights, grad_output)
    ignored = (weights <= 0)[:, None, :].expand(2, 2, 61)
    key[ignored], value[ignored] = poison, poison
    poisoned = run_attention(query, key, value, weights, grad_output)
    for name, before, after in zip(RESULTS[:5], clean, poisoned, strict=False):
        assert torch.equal(before, after), name
    attended = weights > 0
    assert torch.equal(clean[5][attended], poisoned[5][attended])
    assert not poisoned[5][weights < 0].any()


def test_a_nan_in_an_attended_key_is_not_hidden(architecture: str) -> None:
    query, key, value = (t.contiguous() for t in packed_heads(1, 1, 20, 64, torch.float32))
    key[0, 0, 3, 5] = torch.nan
    inputs = AttentionInputs(query, key, value, torch.ones(1, 20), 0.125)
    output, log_sum_exp = CPU.attention_forward(inputs)
    assert output.isnan().all()
    assert log_sum_exp.isnan().all()


@pytest.mark.parametrize("seed", [28, 79, 96, 282])  # tiny weights win beside huge ones
def test_extreme_scores_and_weights(architecture: str, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = packed_heads(1, 2, 40, 64, torch.float32)
    query = query * 30  # scores of a hundred: one key takes all
    weights = 10.0 ** torch.linspace(-30, 30, 40)[None]
    arguments = (query, key, value, weights, 0.125, torch.randn(1, 2, 40, 64))
    output, _, *gradients = run_attention(*arguments[:4], arguments[5])
    oracle.assert_attention_as_accurate((output, *gradients), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 197, 64), (1, 3, 50, 80), (2, 5, 130, 32), (1, 1, 900, 64)]
)
def test_thread_count_changes_no_bit(
    architecture: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    query, key, value = packed_heads(*shape, dtype)
    weights = mixed_weights(shape[0], shape[2])
    grad_output = torch.randn(shape).to(dtype)
    expected: tuple[Tensor, ...] = ()
    for threads in (1, 1, 2, 3, 8):
        torch.set_num_threads(threads)
        results = run_attention(query, key, value, weights, grad_output)
        for name, ours, first in zip(RESULTS, results, expected or results, strict=True):
            assert torch.equal(ours, first), f"{name} with {threads} threads"
        expected = expected or results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width"), [(1, 1), (31, 33), (197, 72), (420, 64)])
def test_every_output_element_is_written(
    architecture: str, length: int, width: int, dtype: torch.dtype
) -> None:
    kernels = cpu._kernels()
    shape = (2, 2, length, width)
    query, key, value = packed_heads(*shape, dtype)
    weights = mixed_weights(2, length)
    weights[1] = 0
    grad_output = torch.randn(shape).to(dtype)
    expected = run_attention(query, key, value, weights, grad_output)
    poisoned = [torch.full_like(t, torch.nan) for t in expected]
    output, log_sum_exp, grad_query, grad_key, grad_value, grad_weights = poisoned
    grids = [common.row_grid(t) for t in (query, key, value)]
    for threads in (1, 3):  # the two ways to cut the backward pass
        first = ((2, 2, length, length, width), common.TYPE_NAMES[dtype], width**-0.5, False)
        kernels.attention_forward(
            *first,
            *grids,
            weights.data_ptr(),
            common.row_grid(output),
            log_sum_exp.data_ptr(),
            threads,
        )
        kernels.attention_backward(
            *first, common.row_grid(grad_output), *grids, weights.data_ptr(),
            common.row_grid(output), log_sum_exp.data_ptr(),
            *map(common.row_grid, (grad_query, grad_key, grad_value)),
            grad_weights.data_ptr(), threads,
        )  # fmt: skip
        for name, ours, wanted in zip(RESULTS, poisoned, expected, strict=True):
            assert torch.equal(ours, wanted), f"{name} with {threads} threads"


def test_strides_do_not_matter(architecture: str) -> None:
    query, key, value = packed_heads(2, 3, 60, 64, torch.float32)
    key = key[:, :1].expand(2, 3, 60, 64)  # stride 0
    value = torch.randn(2, 3, 120, 64)[:, :, ::2]
    weights = torch.rand(60, 2).mT
    grad_output = torch.randn(2, 3, 64, 60).mT  # no unit stride
    strided = run_attention(query, key, value, weights, grad_output)
    dense = run_attention(*(t.contiguous() for t in (query, key, value, weights, grad_output)))
    for name, ours, expected in zip(RESULTS, strided, dense, strict=True):
        assert torch.equal(ours, expected), name
    expanded = run_attention(query, key, value, weights, torch.ones(()).expand(2, 3, 60, 64))
    ones = run_attention(query, key, value, weights, torch.ones(2, 3, 60, 64))
    assert all(torch.equal(a, b) for a, b in zip(expanded, ones, strict=True))


def test_weights_without_gradient_change_no_bit(architecture: str) -> None:
    query, key, value = packed_heads(1, 2, 77, 64, torch.float32)
    weights = mixed_weights(1, 77)
    inputs = AttentionInputs(query, key, value, weights, 0.125)
    grad_output = torch.randn(query.shape)
    *with_weights, _ = oracle.run_attention(CPU, inputs, grad_output, True)
    *without, no_grad_weights = oracle.run_attention(CPU, inputs, grad_output, False)
    assert no_grad_weights.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(with_weights, without, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(dtype: torch.dtype) -> None:
    """4096 tokens, of which a few queries are compared: float64 for all would take long."""
    shape = (1, 2, 4096, 64)
    query, key, value = packed_heads(*shape, dtype)
    weights = torch.rand(1, 4096) + 0.1
    compared = torch.tensor([0, 47, 48, 1000, 4095])
    grad_output = torch.zeros(shape).to(dtype)
    grad_output[:, :, compared] = torch.randn(1, 2, 5, 64).to(dtype)
    output, _, *gradients = run_attention(query, key, value, weights, grad_output)
    ours = (output[:, :, compared], gradients[0][:, :, compared], *gradients[1:])
    rows = (query[:, :, compared], key, value, weights, 0.125, grad_output[:, :, compared])
    oracle.assert_attention_as_accurate(ours, *rows)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(1, 110),
    width=st.sampled_from([1, 3, 16, 24, 64, 72, 80, 88, 96, 104, 112, 128, 131]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    batch: int, heads: int, length: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    assert_attention_is_accurate(attention_case((batch, heads, length, width), dtype, True, seed))
