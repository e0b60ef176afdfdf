"""The oracle of attention statistics: float64, and the error plain PyTorch itself makes."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import torch
from torch import Tensor

from tir_kernels import AttentionStatistics


def explicit_statistics(
    q: Tensor, k: Tensor, weights: Tensor | None, num_prefix_tokens: int, scale: float
) -> AttentionStatistics:
    """Statistics as anyone would write them in PyTorch, at the type of q, with its matrix."""
    scores = q @ k.mT * scale
    if weights is not None:
        scores = scores + weights.to(q.dtype).clamp(min=0).log()[:, None, None, :]
    log_sum_exp = scores.logsumexp(-1)
    attended = log_sum_exp.isneginf().logical_not()[..., None]
    attention = torch.where(attended, scores, 0.0).softmax(-1) * attended
    patches = q.shape[2] - num_prefix_tokens
    return AttentionStatistics(
        attention[:, :, :num_prefix_tokens].sum(2) / max(num_prefix_tokens, 1),
        attention[:, :, num_prefix_tokens:].sum(2) / max(patches, 1),
        torch.special.entr(attention).sum(-1),
        log_sum_exp,
    )


def magnitudes(
    q: Tensor, k: Tensor, weights: Tensor | None, num_prefix_tokens: int, scale: float
) -> AttentionStatistics:
    """Absolute values of the terms of each statistic, for float64 arguments.

    A score is a sum, to which the logarithm of a weight is added; attention is the exponential of
    it less a log-sum-exp, which may be stored in between.
    """
    exact = explicit_statistics(q, k, weights, num_prefix_tokens, scale)
    terms = q.abs() @ k.abs().mT * abs(scale)
    logs = torch.zeros_like(terms)
    if weights is not None:
        logs = weights.clamp(min=0).log().nan_to_num(neginf=-torch.inf)[:, None, None, :]
        terms = terms + torch.where(logs.isneginf(), 0.0, logs.abs())
    log_sum_exp = exact.log_sum_exp.masked_fill(exact.log_sum_exp.isneginf(), 0.0)[..., None]
    attention = (q @ k.mT * scale + logs - log_sum_exp).exp()
    spread = exact.entropy[..., None] + torch.where(attention > 0, attention.log().abs(), 0.0)
    mean_terms = (attention * terms).sum(-1, keepdim=True)
    received = attention * (1 + terms + mean_terms + log_sum_exp.abs())
    patches = q.shape[2] - num_prefix_tokens
    return AttentionStatistics(
        received[:, :, :num_prefix_tokens].sum(2) / max(num_prefix_tokens, 1),
        received[:, :, num_prefix_tokens:].sum(2) / max(patches, 1),
        1 + exact.entropy + (attention * spread * (1 + terms)).sum(-1),
        (1 + log_sum_exp.abs() + mean_terms).squeeze(-1),
    )


def assert_statistics_as_accurate(
    ours: AttentionStatistics,
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
) -> None:
    """Compare with float64 and with plain PyTorch in float32, whatever the type of q."""

    def of_type(function: Callable, dtype: torch.dtype) -> AttentionStatistics:
        in_type = (t if t is None else t.detach().to(dtype) for t in (q, k, weights))
        return function(*in_type, num_prefix_tokens, scale)

    results = zip(
        AttentionStatistics._fields,
        ours,
        of_type(explicit_statistics, torch.float32),
        of_type(explicit_statistics, torch.float64),
        of_type(magnitudes, torch.float64),
        strict=True,
    )
    for name, found, plain, exact, magnitude in results:
        assert found.dtype == torch.float32, name
        if name == "log_sum_exp":  # compared where a query attends to something
            is_empty = exact.isneginf()
            assert torch.equal(found.isneginf(), is_empty)
            found, plain, exact = (t.masked_fill(is_empty, 0.0) for t in (found, plain, exact))
        oracle.assert_as_accurate(name, found, plain, exact, magnitude)
