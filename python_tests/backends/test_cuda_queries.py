"""The CUDA forward and statistics kernels, emulated, for other numbers of queries than of keys and
under causality: every plan, and what is skipped.
"""

from __future__ import annotations

import math

import cuda_emulation
import oracle
import pytest
import torch
from torch import Tensor

from tir_kernels.backends.inputs import AttentionInputs, StatisticsInputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Multiprocessors and bytes: warps with several rounds of rows, or one each; keys that stay or pass.
DEVICES = [(1, 227 * 1024), (132, 227 * 1024), (1, 99 * 1024)]
# Lq, L: one query, ends of tiles and of chunks of both, keys that no query sees.
LENGTHS = [(1, 70), (64, 33), (130, 210), (161, 161)]

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "runs"),
    pytest.mark.slow,
]


def draw(lengths: tuple[int, int], width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys and values of two heads, and weights of every kind; the first see nothing."""
    num_queries, num_keys = lengths
    generator = torch.Generator().manual_seed(num_queries + 1000 * num_keys + width)
    q = torch.randn(1, num_queries, 2, width, generator=generator).to(dtype).transpose(1, 2)
    packed = torch.randn(1, num_keys, 2, 2, width, generator=generator).to(dtype)
    weights = torch.rand(1, num_keys, generator=generator) * 2 + 0.01
    weights[:, ::5], weights[:, 3::7] = 0.0, -1.0
    return (q, *packed.permute(2, 0, 3, 1, 4), weights)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("width", [64, 72, 128])
def test_forward(kernels, width: int, device: tuple[int, int], is_causal: bool) -> None:
    kernels.set_device(*device)
    backend, scale = cuda_emulation.register(), width**-0.5
    for lengths in LENGTHS:
        for dtype in DTYPES:
            q, k, v, weights = draw(lengths, width, dtype)
            output, log_sum_exp = backend.attention_forward(
                AttentionInputs(q, k, v, weights, scale, is_causal)
            )
            plain = oracle.plain_attention(q, k, v, weights, scale, is_causal)
            exact, magnitudes = oracle.exact_attention(
                q, k, v, weights, scale, torch.zeros_like(q), is_causal
            )
            oracle.assert_as_accurate("output", output, plain, exact[0], magnitudes[0])
            doubles = (t.double() for t in (q, k, v, weights))
            exact_sums = oracle.REFERENCE.attention_forward(
                AttentionInputs(*doubles, scale, is_causal)
            )[1]
            torch.testing.assert_close(log_sum_exp.double(), exact_sums, atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_warps_and_rounds_changes_no_bit(kernels, dtype: torch.dtype) -> None:
    for lengths in LENGTHS:
        q, k, v, weights = draw(lengths, 64, dtype)
        inputs = AttentionInputs(q, k, v, weights, 0.125, True)
        statistics = StatisticsInputs(q, k, weights, 0.125, 1, True)
        expected = None
        for device in DEVICES:
            kernels.set_device(*device)
            backend = cuda_emulation.register()
            found = (*backend.attention_forward(inputs), *backend.attention_statistics(statistics))
            expected = expected or found
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("width", [64, 72, 20])
def test_nan_of_values_without_weight_stays_there(
    kernels, width: int, device: tuple[int, int]
) -> None:
    """Values are loaded before weights are known, in chunks that stay or pass, and cleared then."""
    kernels.set_device(*device)
    backend = cuda_emulation.register()
    for dtype in DTYPES:
        q, k, v, weights = draw((161, 161), width, dtype)
        weights[:, 64:128] = 1.0  # a chunk of which all are kept
        clean, dirty = v.clone(), v.clone()
        ignored = weights[0] <= 0
        clean[:, :, ignored], dirty[:, :, ignored] = 0.0, math.nan
        expected, found = (
            backend.attention_forward(AttentionInputs(q, k, each, weights, 0.125))
            for each in (clean, dirty)
        )
        assert all(map(torch.equal, found, expected))


def test_keys_that_no_query_sees_are_not_read(kernels) -> None:
    """Chunks of them: 0 times the NaN of a value would show."""
    q, k, v, weights = draw((64, 200), 64, torch.bfloat16)
    k, v = k.clone(), v.clone()
    k[:, :, 64:], v[:, :, 64:] = math.nan, math.nan
    inputs = AttentionInputs(q, k, v, weights, 0.125, True)
    backend = cuda_emulation.register()
    for result in backend.attention_forward(inputs):
        assert not result.isnan().any()
    found = backend.attention_statistics(StatisticsInputs(q, k, weights, 0.125, 1, True))
    assert (found.received_from_patches[:, :, 64:] == 0).all()
    assert (found.received_from_prefix[:, :, 1:] == 0).all()
