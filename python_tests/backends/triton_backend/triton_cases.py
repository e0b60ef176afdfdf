"""Cases and bounds for the tests of the Triton backend, and the device that its kernels run on."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

pytest.importorskip("triton", reason="Triton is not installed")

import oracle
import statistics_oracle

from tir_kernels.backends import reference
from tir_kernels.backends.common import result_strides
from tir_kernels.backends.inputs import AttentionInputs, RelevanceInputs, StatisticsInputs
from tir_kernels.backends.protocol import AttentionStatistics
from tir_kernels.backends.triton import TritonBackend, interpreter_is_on

BACKEND = TritonBackend()
INTERPRETED = interpreter_is_on()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_inputs(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Views of one packed projection, a strided gradient, and weights of which some are <= 0."""
    packed = random_tensor(batch, length, 3, heads, head_dim, dtype=dtype, seed=length).to(device)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    grad_output = random_tensor(batch, length, heads, head_dim, dtype=dtype, seed=1).to(device)
    weights = random_tensor(batch, length, seed=2).to(device) * 0.7 + 1.0
    weights[:, 1::7] = 0.0
    return query, key, value, grad_output.transpose(1, 2), weights


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> list[Tensor]:
    """Output, log-sum-exp and gradients by plain operations in the type of the inputs."""
    ignored = (weights <= 0)[:, None, None, :]
    factors = weights.to(query.dtype)[:, None, None, :].masked_fill(ignored, 0.0)
    scores = query @ key.mT * scale
    log_sums = (scores + factors.log()).logsumexp(-1, keepdim=True)
    per_weight = (scores - log_sums).exp()
    probabilities = per_weight * factors
    output = probabilities @ value
    delta = (grad_output * output).sum(-1, keepdim=True)
    grad_per_weight = per_weight * (grad_output @ value.mT - delta)
    grad_scores = grad_per_weight * factors
    return [
        output,
        log_sums[..., 0],
        grad_scores @ key * scale,
        grad_scores.mT @ query * scale,
        probabilities.mT @ grad_output,
        grad_per_weight.sum((1, 2)).masked_fill(weights < 0, 0.0),
    ]


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> list[Tensor]:
    doubles = AttentionInputs(*(t.double() for t in (query, key, value, weights)), scale)
    return list(oracle.run_attention(oracle.REFERENCE, doubles, grad_output.double()))


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> list[Tensor]:
    inputs = AttentionInputs(query, key, value, weights, scale)
    return list(oracle.run_attention(BACKEND, inputs, grad_output))


def assert_as_exact_as_plain(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    step = torch.finfo(ours.dtype).eps
    for statistic in (torch.Tensor.amax, torch.Tensor.mean):
        error = statistic((ours.double() - exact).abs()).item()
        allowed = 2 * statistic((plain.double() - exact).abs()) + step * statistic(exact.abs())
        assert error <= allowed.item(), f"{name}: {statistic.__name__} error {error:.2e}"


def check_attention(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    inputs = attention_inputs(batch, heads, length, head_dim, dtype, device)
    scale = head_dim**-0.5
    results = run_attention(*inputs, scale)
    assert results[0].stride() == result_strides(inputs[0])
    assert [t.dtype for t in results] == [dtype, torch.float32, *3 * [dtype], torch.float32]
    names = ("output", "log_sum_exp", "grad_query", "grad_key", "grad_value", "grad_weights")
    plain, exact = plain_attention(*inputs, scale), exact_attention(*inputs, scale)
    for name, ours, other, true in zip(names, results, plain, exact, strict=True):
        assert ours.shape == true.shape
        assert_as_exact_as_plain(ours, other, true, name)


def run_statistics(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str
) -> AttentionStatistics:
    """Statistics of the queries, keys and weights of :func:`attention_inputs`, checked."""
    query, key, *_, weights = attention_inputs(batch, heads, length, head_dim, dtype, device)
    scale = head_dim**-0.5
    found = BACKEND.attention_statistics(StatisticsInputs(query, key, weights, scale, 1))
    statistics_oracle.assert_statistics_as_accurate(found, query, key, weights, 1, scale)
    return found


def relevance_inputs(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    length: int = 50,
    width: int = 72,
    features: int = 40,
    classes: int = 5,
    groups: int = 1,
    norm: bool = True,
    proj: bool = True,
    prefix: int = 1,
) -> RelevanceInputs:
    features = features if proj else width
    return RelevanceInputs(
        (random_tensor(batch, length, width) * 2 + 3).to(dtype).to(device),
        random_tensor(groups, classes, features, dtype=dtype, seed=1).to(device),
        (random_tensor(width, seed=2) * 0.2 + 1).to(dtype).to(device) if norm else None,
        random_tensor(width, dtype=dtype, seed=3).to(device) if norm else None,
        1e-5 if norm else None,
        (random_tensor(width, features, seed=4) * width**-0.5).to(dtype).to(device)
        if proj
        else None,
        prefix,
    )


def plain_relevance(inputs: RelevanceInputs) -> Tensor:
    """The formula in the type of the tokens, but for the cosine's quotient."""
    tokens, classes, norm_weight, norm_bias, norm_eps, proj, prefix = inputs
    features = tokens[:, prefix:]
    if norm_eps is not None:
        features = torch.nn.functional.layer_norm(
            features, features.shape[-1:], norm_weight, norm_bias, norm_eps
        )
    if proj is not None:
        features = features @ proj
    grouped = features.unflatten(0, (classes.shape[0], -1))
    products = (grouped @ classes.mT[:, None]).flatten(0, 1).mT
    class_norms = classes.norm(dim=-1)[:, None].expand(-1, grouped.shape[1], -1).flatten(0, 1)
    return products.float() / (features.norm(dim=-1)[:, None] * class_norms[..., None]).float()


def check_relevance(inputs: RelevanceInputs) -> None:
    ours = BACKEND.relevance(inputs)
    doubles = (t.double() if isinstance(t, Tensor) else t for t in inputs)
    exact = reference.exact_relevance(RelevanceInputs._make(doubles))
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert_as_exact_as_plain(ours, plain_relevance(inputs), exact, "relevance")
