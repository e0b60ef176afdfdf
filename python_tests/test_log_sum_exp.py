"""The log-sum-exp that attention returns where it is asked for."""

from typing import Any

import pytest
import torch
from test_attention import draw_heads, draw_weights
from torch import Tensor

from tir_kernels import reweighted_attention, token_weights, weighted_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = draw_heads(2, 3, 21, 64, "packed", generator)
    weights = draw_weights("empty row", 2, 21, generator)
    return [t.to(device, dtype) for t in rows], weights.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, device: str, dtype: torch.dtype) -> None:
    (q, k, v), weights = draw(device, dtype)
    for given in (weights, None):
        output, found = weighted_attention(q, k, v, given, backend=backend, return_lse=True)
        scores = q.double() @ k.double().mT / 8
        if given is not None:
            scores = scores + given.double().clamp(min=0).log()[:, None, None]
        assert found.dtype == torch.float32
        assert torch.equal(output, weighted_attention(q, k, v, given, backend=backend))
        torch.testing.assert_close(found.double(), scores.logsumexp(-1), atol=4e-6, rtol=2e-6)
        assert found[0].isneginf().all() == (given is not None)


def test_it_has_no_gradient_and_changes_none(backend: str, device: str) -> None:
    rows, weights = draw(device)
    leaves = [t.detach().requires_grad_() for t in (*rows, weights)]
    output, log_sum_exp = weighted_attention(*leaves, backend=backend, return_lse=True)
    assert not log_sum_exp.requires_grad
    alone = weighted_attention(*leaves, backend=backend)
    for one, other in zip(
        torch.autograd.grad(output.square().sum(), leaves),
        torch.autograd.grad(alone.square().sum(), leaves),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_results_come_in_the_order_of_the_arguments(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    rows, _ = draw(device)
    leaves = [t.detach().requires_grad_() for t in rows]
    tokens = torch.randn(2, 21, 16, generator=generator).to(device)
    classes = torch.randn(5, 16, generator=generator).to(device)

    def call(**asked: bool) -> Any:
        return reweighted_attention(*leaves, tokens, classes, backend=backend, **asked)

    expected = token_weights(tokens, classes, backend=backend)
    output, log_sum_exp = weighted_attention(
        *leaves, expected.weights, backend=backend, return_lse=True
    )
    alone = call(return_lse=True)
    with_weights = call(return_lse=True, return_weights=True)
    with_counts = call(return_lse=True, return_counts=True)
    with_both = call(return_lse=True, return_counts=True, return_weights=True)
    assert [len(found) for found in (alone, with_weights, with_counts, with_both)] == [2, 3, 3, 3]
    for found in (alone, with_weights, with_counts, with_both):
        assert torch.equal(found[0], output)
        torch.testing.assert_close(found[-1], log_sum_exp)
        assert not found[-1].requires_grad
    for weighted in (with_weights[1], with_both[1]):
        assert torch.equal(weighted.weights, expected.weights)
        assert torch.equal(weighted.counts, expected.counts)
    assert torch.equal(with_counts[1], expected.counts)


@pytest.mark.slow
def test_compile(backend: str, device: str) -> None:
    def total(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        output, log_sum_exp = weighted_attention(q, k, v, weights, backend=backend, return_lse=True)
        tokens = q[:, 0, :, :16].detach()
        again: Any = reweighted_attention(
            q, k, v, tokens, torch.ones(3, 16, device=q.device), backend=backend, return_lse=True
        )
        return output.sum() + log_sum_exp.sum() + again[0].sum() + again[1].sum()

    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    rows, _ = draw(device)
    leaves = [t.detach().requires_grad_() for t in rows]
    weights = torch.rand(2, 21, device=device) + 0.1
    results = [function(*leaves, weights) for function in (compiled, total)]
    torch.testing.assert_close(*results)
    for one, other in zip(
        *(torch.autograd.grad(result, leaves) for result in results), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_float64_stays_float64() -> None:
    q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    assert weighted_attention(q, q, q, return_lse=True)[1].dtype == torch.float64
