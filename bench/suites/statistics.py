"""Attention statistics beside attention that is written out and summed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.counting import NUMBER_BYTES, Cost
from bench.operators import WEIGHTED_ATTENTION, Operator
from bench.peers.common import COMPILED, EAGER, Peer, compiled, own_peers
from bench.problems import AttentionProblem, require_close
from bench.settings import Settings
from bench.shapes import PREFIX_TOKENS, Point, points
from tir_kernels import AttentionStatistics, attention_statistics

from .common import LAST, operator_case

# Returns (received from prefix, received from patches, entropy, log-sum-exp), each (B, H, L).
Describe = Callable[[], Any]


class StatisticsProblem(AttentionProblem):
    """Query and key as views of a packed projection, and key weights."""

    def verify(self, forward: Describe, direction: str, *, is_weighted: bool = True) -> None:
        """Compare all four statistics with float64."""
        with torch.no_grad():
            found = forward()
        query, key, _ = (self._corners(leaf).double() for leaf in self.leaves)
        weights = self.weights[[0, -1]][: len(query)].double()
        expected = materialised(query, key, weights, self.scale)
        for name, ours, exact in zip(AttentionStatistics._fields, found, expected, strict=True):
            require_close(name, self._corners(ours), exact, self.query.dtype)


def materialised(query: Tensor, key: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, ...]:
    """The formulas as they are written down: scores and attention are (B, H, L, L) matrices."""
    bias = weights.clamp(min=0).log()[:, None, None, :].to(query.dtype)
    scores = query @ key.mT * scale + bias
    attention = scores.softmax(-1)
    return (
        attention[:, :, :PREFIX_TOKENS].mean(2),
        attention[:, :, PREFIX_TOKENS:].mean(2),
        torch.special.entr(attention).sum(-1),
        scores.logsumexp(-1),
    )


def statistics_peers(settings: Settings) -> list[Peer]:
    """Our backends, and the materialised formulas as they are and compiled."""
    return [
        *own_peers(settings, _ours, reference_scores=4),
        Peer(EAGER, _eager, score_tensors=3),
        Peer(COMPILED, _compiled, settings.why_not_compiled, is_compiled=True, score_tensors=3),
    ]


def _arguments(problem: StatisticsProblem) -> tuple[Tensor, Tensor, Tensor, float]:
    return problem.query, problem.key, problem.weights, problem.scale


def _ours(backend: str, problem: StatisticsProblem) -> Describe:
    *tensors, scale = _arguments(problem)
    return lambda: attention_statistics(
        *tensors, num_prefix_tokens=PREFIX_TOKENS, scale=scale, backend=backend
    )


def _eager(problem: StatisticsProblem) -> Describe:
    return lambda: materialised(*_arguments(problem))


def _compiled(problem: StatisticsProblem) -> Describe:
    function = compiled(materialised)
    return lambda: function(*_arguments(problem))


def statistics_cost(point: Point) -> Cost:
    """Queries, keys and weights in, four results out; one product, which gives the scores."""
    rows = point.images * point.heads * point.length
    heads = 2 * rows * point.head_dim * point.itemsize
    others = (point.images * point.length + 4 * rows) * NUMBER_BYTES
    return Cost(heads + others, 2 * rows * point.length * point.head_dim)


ATTENTION_STATISTICS = Operator(
    name="attention_statistics",
    directions=("forward",),
    sizes=WEIGHTED_ATTENTION.sizes,
    peers=statistics_peers,
    problem=StatisticsProblem,
    cost=lambda point, direction: statistics_cost(point),
    model_tensors=3,  # query, key and, unused, value
)


def statistics_cases(settings: Settings) -> list[Case]:
    if not settings.wants("forward"):
        return []
    found = points("attention", settings)
    return [
        operator_case("statistics", ATTENTION_STATISTICS, point, "forward", settings, priority=LAST)
        for point in found
    ]
