"""The CPU backend's softmax where a row's largest score is far from those of its first keys."""

from __future__ import annotations

import oracle
import pytest
import torch
from attention_cases import run_attention
from torch import Tensor

from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators.choose import load_backend

CPU = load_backend("cpu")
WIDTH, SCALE = 64, 0.125

pytestmark = pytest.mark.skipif(CPU.unavailable() != "", reason=CPU.unavailable() or "runs here")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw_rows(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value; their first channel adds to the scores of each second query alone."""
    torch.manual_seed(length)
    query, key, value = (torch.randn(1, 2, length, WIDTH) for _ in range(3))
    query[..., 0] = torch.arange(length) % 2 * 8.0
    key[..., 0] = 0
    return [t.to(dtype) for t in (query, key, value)]


@both_dtypes
@pytest.mark.parametrize("excess", [3.0, 12.0, 40.0, 90.0, 200.0, 3e3, 1e6, -200.0, -1e6])
@pytest.mark.parametrize(("length", "place"), [(40, 35), (197, 100), (197, 3), (700, 699)])
def test_one_key_above_or_below_all_others(
    architecture: str, length: int, place: int, excess: float, dtype: torch.dtype
) -> None:
    query, key, value = draw_rows(length, dtype)
    key[..., place, 0] = excess
    weights = torch.rand(1, length) + 0.5
    arguments = (query, key, value, weights, SCALE, torch.randn(1, 2, length, WIDTH).to(dtype))
    output, log_sum_exp, *gradients = run_attention(*arguments[:4], arguments[5])
    oracle.assert_attention_as_accurate((output, *gradients), *arguments)
    scores = query.double() @ key.double().mT * SCALE + weights.double().log()
    torch.testing.assert_close(log_sum_exp.double(), scores.logsumexp(-1), atol=4e-6, rtol=2e-6)


@both_dtypes
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_first_keys_of_other_weights(architecture: str, size: float, dtype: torch.dtype) -> None:
    query, key, value = draw_rows(90, dtype)
    weights = torch.rand(1, 90) + 0.5
    weights[:, :40] *= size
    arguments = (query, key, value, weights, SCALE, torch.randn(1, 2, 90, WIDTH).to(dtype))
    output, _, *gradients = run_attention(*arguments[:4], arguments[5])
    oracle.assert_attention_as_accurate((output, *gradients), *arguments)


def assert_output_is_accurate(query: Tensor, key: Tensor, value: Tensor) -> None:
    inputs = AttentionInputs(query, key, value, torch.ones(1, key.shape[2]), SCALE)
    output, _ = CPU.attention_forward(inputs)
    plain = oracle.plain_attention(query, key, value, inputs.weights, SCALE)
    rows = (t.double() for t in (query, key, value))
    exact = oracle.plain_attention(*rows, inputs.weights.double(), SCALE)
    oracle.assert_as_accurate("output", output, plain, exact)


@both_dtypes
@pytest.mark.parametrize("length", [64, 700])
@pytest.mark.parametrize("excess", [0.0, 10.0, 60.0])
def test_values_near_the_largest_float(
    architecture: str, length: int, excess: float, dtype: torch.dtype
) -> None:
    query, key, value = draw_rows(length, dtype)
    key[..., 50, 0] = excess
    assert_output_is_accurate(query, key, (value * 1e32).to(dtype))


@both_dtypes
@pytest.mark.parametrize("excess", [1e8, 3e9, 1e30, -1e30])
@pytest.mark.parametrize("places", [slice(0, 1), slice(3, 40), slice(40, 41), slice(0, 90)])
def test_huge_scores(architecture: str, places: slice, excess: float, dtype: torch.dtype) -> None:
    query, key, value = draw_rows(90, dtype)
    key[..., places, 0] = excess * torch.linspace(0.5, 1, 90)[places]
    assert_output_is_accurate(query, key, value)


@both_dtypes
@pytest.mark.parametrize("place", [0, 5, 31, 32, 77])
def test_infinite_scores(architecture: str, place: int, dtype: torch.dtype) -> None:
    query, key, value = draw_rows(90, dtype)
    query[..., 0] = 1 - query[..., 0] / 4  # 1 or -1
    key[..., place, 0] = torch.inf
    inputs = AttentionInputs(query, key, value, torch.ones(1, 90), SCALE)
    output, log_sum_exp = CPU.attention_forward(inputs)
    # A row of a score of infinity has no softmax; a score of minus infinity takes no part.
    assert output[..., ::2, :].isnan().all()
    assert log_sum_exp[..., ::2].isnan().all() or log_sum_exp[..., ::2].isposinf().all()
    others = torch.arange(90) != place
    rest = AttentionInputs(query, key[..., others, :], value[..., others, :],
                           torch.ones(1, 89), SCALE)  # fmt: skip
    expected, expected_sums = CPU.attention_forward(rest)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output[..., 1::2, :], expected[..., 1::2, :], atol=8 * eps, rtol=eps)
    torch.testing.assert_close(log_sum_exp[..., 1::2], expected_sums[..., 1::2])
