"""Attention statistics of the reference in float64, by ways that do not share its formulas."""

import pytest
import scipy.stats
import statistics_oracle
import torch
from torch import Tensor

from tir_kernels import attention_statistics, weighted_attention

LENGTH, PREFIX, SCALE = 13, 3, 0.4


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    q, k = (
        torch.randn(2, 3, LENGTH, 8, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return q, k, torch.rand(2, LENGTH, generator=generator, dtype=torch.float64) + 0.2


def attention(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """A (B, H, L, L): attention to values that are the unit vectors."""
    unit = torch.eye(LENGTH, dtype=torch.float64).expand(*q.shape[:3], LENGTH)
    wide = [torch.nn.functional.pad(t, (0, LENGTH - t.shape[3])) for t in (q, k)]
    return weighted_attention(*wide, unit, weights, scale=SCALE)


def test_the_explicit_softmax(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    found = attention_statistics(*problem, num_prefix_tokens=PREFIX, scale=SCALE)
    explicit = statistics_oracle.explicit_statistics(*problem, PREFIX, SCALE)
    matrix = attention(*problem)
    entropy = torch.from_numpy(scipy.stats.entropy(matrix.numpy(), axis=-1))
    means = matrix[:, :, :PREFIX].mean(2), matrix[:, :, PREFIX:].mean(2)
    for ours, expected in zip(found, explicit, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected)
    for ours, expected in zip(found, (*means, entropy), strict=False):
        torch.testing.assert_close(ours, expected)


def test_the_derivative_of_the_normaliser(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """The mean attention that a key receives is that of d log_sum_exp[i] / d ln w[j]."""
    q, k, weights = problem
    found = attention_statistics(q, k, weights, num_prefix_tokens=PREFIX, scale=SCALE)
    # One logarithm per head, although the weights are shared by the heads of an image.
    logs = weights.log()[:, None].repeat(1, q.shape[1], 1).requires_grad_()
    log_sum_exp = (q @ k.mT * SCALE + logs[:, :, None]).logsumexp(-1)
    torch.testing.assert_close(found.log_sum_exp, log_sum_exp.detach())
    for received, queries in ((found[0], slice(PREFIX)), (found[1], slice(PREFIX, None))):
        mean = log_sum_exp[:, :, queries].mean(-1).sum()
        (derivative,) = torch.autograd.grad(mean, logs, retain_graph=True)
        torch.testing.assert_close(received, derivative)


def test_the_removal_identity(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Without key j, a query's log-sum-exp tells what its attention to j was."""
    q, k, weights = problem
    options = {"num_prefix_tokens": PREFIX, "scale": SCALE}
    found = attention_statistics(q, k, weights, **options)
    for j in range(LENGTH):
        without = weights.clone()
        without[:, j] = 0.0
        reduced = attention_statistics(q, k, without, **options)
        attended = -torch.expm1(reduced.log_sum_exp - found.log_sum_exp)
        assert (reduced.received_from_patches[..., j] == 0).all()
        for received, queries in ((found[0], slice(PREFIX)), (found[1], slice(PREFIX, None))):
            mean = attended[:, :, queries].mean(-1)
            torch.testing.assert_close(received[..., j], mean, atol=1e-14, rtol=1e-12)


def test_entropy_by_finite_temperature(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Without weights, entropy is the derivative of T log_sum_exp(s / T) by T at T = 1."""
    q, k, _ = problem
    temperature = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = attention_statistics(q, k, scale=SCALE).entropy
    for row in range(LENGTH):
        scores = q[:, :, row, None] @ k.mT * SCALE
        free_energy = temperature * (scores / temperature).logsumexp(-1)
        (derivative,) = torch.autograd.grad(free_energy.sum(), temperature)
        torch.testing.assert_close(found[:, :, row].sum(), derivative)
