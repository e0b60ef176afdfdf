"""Attention problems and what the CPU backend's results for them are compared with."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import oracle
import torch
from torch import Tensor

from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators.choose import load_backend

RESULTS = ("output", "log_sum_exp", "grad_query", "grad_key", "grad_value", "grad_weights")


def packed_heads(
    batch: int, heads: int, length: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key and value as views into one (B, L, 3, H, d) projection."""
    packed = torch.randn(batch, length, 3, heads, width).to(dtype)
    return list(packed.permute(2, 0, 3, 1, 4).unbind(0))


def mixed_weights(batch: int, length: int) -> Tensor:
    """Positive weights with zeros and negative ones among them."""
    weights = torch.rand(batch, length) * 2 + 0.01
    weights[:, 1::5] = 0
    weights[:, 3::7] = -1
    return weights


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, grad_output: Tensor
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and the gradients of query, key, value and weights."""
    scale = query.shape[-1] ** -0.5
    inputs = AttentionInputs(query, key, value, weights, scale)
    return oracle.run_attention(load_backend("cpu"), inputs, grad_output)


@dataclass(frozen=True)
class Case:
    """Inputs of attention, and what its results are compared with."""

    inputs: tuple[Tensor, ...]  # query, key, value, weights, gradient of the output
    plain: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]
    magnitudes: tuple[Tensor, ...]
    log_sum_exp: Tensor


@functools.lru_cache(maxsize=64)  # shared by the instruction sets
def attention_case(
    shape: tuple[int, int, int, int], dtype: torch.dtype, has_ignored_keys: bool, seed: int = 0
) -> Case:
    torch.manual_seed(seed)
    batch, _, length, width = shape
    query, key, value = packed_heads(*shape, dtype)
    weights = torch.rand(batch, length) * 2 + 0.01
    if has_ignored_keys:
        weights = mixed_weights(batch, length)
        weights[1:2] = 0
        weights[2:3] = -1
    grad_output = torch.randn(shape).to(dtype)
    arguments = (query, key, value, weights, width**-0.5, grad_output)
    inputs = AttentionInputs(*(t.double() for t in arguments[:4]), width**-0.5)
    return Case(
        (query, key, value, weights, grad_output),
        (*oracle.plain_gradients(*arguments), oracle.plain_weight_gradient(*arguments)),
        *oracle.exact_attention(*arguments),
        oracle.REFERENCE.attention_forward(inputs)[1],
    )


def assert_attention_is_accurate(case: Case) -> None:
    output, log_sum_exp, *gradients = run_attention(*case.inputs)
    names = (name for name in RESULTS if name != "log_sum_exp")
    results = zip(names, (output, *gradients), case.plain, case.exact, case.magnitudes, strict=True)
    for name, ours, plain, exact, magnitude in results:
        oracle.assert_as_accurate(name, ours, plain, exact, magnitude)
    torch.testing.assert_close(log_sum_exp.double(), case.log_sum_exp, atol=2e-5, rtol=2e-6)
