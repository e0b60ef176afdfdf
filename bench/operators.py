"""The operators that are measured: their tensors, their peers, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .counting import (
    Cost,
    attention_cost,
    relevance_cost,
    reweighted_attention_cost,
    statistics_cost,
    token_weights_cost,
)
from .peers import Peer
from .peers.attention import attention_peers, statistics_peers
from .peers.relevance import relevance_peers, token_weights_peers, whole_peers
from .problems import (
    AttentionProblem,
    Problem,
    RelevanceProblem,
    ReweightedProblem,
    StatisticsProblem,
    TokenWeightsProblem,
)
from .settings import DIRECTIONS, Settings
from .shapes import Point


@dataclass(frozen=True)
class Operator:
    """An operator.

    Args:
        name: As in the records.
        directions: What of it is measured.
        sizes: Names of the sizes that matter to it, as in the records.
        peers: The implementations that compete.
        problem: The tensors of a shape on a device.
        cost: Useful work of a call at a shape, in a direction.
        model_tensors: How many (B, L, D) tensors its inputs, outputs and gradients take, roughly.
    """

    name: str
    directions: tuple[str, ...]
    sizes: tuple[str, ...]
    peers: Callable[[Settings], list[Peer]]
    problem: Callable[[Point, str], Problem]
    cost: Callable[[Point, str], Cost]
    model_tensors: int

    def tensor_bytes(self, point: Point) -> int:
        """Size of inputs, outputs and gradients, roughly."""
        tensor = point.images * point.length * point.model_dim * point.itemsize
        return self.model_tensors * tensor


_OF_ATTENTION = ("B", "H", "L", "d")
_OF_TOKENS = ("B", "L", "D", "E", "C")

WEIGHTED_ATTENTION = Operator(
    name="weighted_attention",
    directions=DIRECTIONS,
    sizes=_OF_ATTENTION,
    peers=attention_peers,
    problem=AttentionProblem,
    cost=attention_cost,
    # Query, key, value, output and its gradient, and the gradients of the first three.
    model_tensors=8,
)
ATTENTION_STATISTICS = Operator(
    name="attention_statistics",
    directions=("forward",),
    sizes=_OF_ATTENTION,
    peers=statistics_peers,
    problem=StatisticsProblem,
    cost=lambda point, direction: statistics_cost(point),
    model_tensors=3,  # query, key and, unused, value
)
TOKEN_RELEVANCE = Operator(
    name="token_relevance",
    directions=("forward",),
    sizes=_OF_TOKENS,
    peers=relevance_peers,
    problem=RelevanceProblem,
    cost=lambda point, direction: relevance_cost(point),
    model_tensors=3,  # tokens, what the norm makes of them, and features
)
TOKEN_WEIGHTS = replace(
    TOKEN_RELEVANCE,
    name="token_weights",
    peers=token_weights_peers,
    problem=TokenWeightsProblem,
    cost=lambda point, direction: token_weights_cost(point),
)
REWEIGHTED_ATTENTION = Operator(
    name="reweighted_attention",
    directions=("forward", "forward+backward"),
    sizes=(*_OF_ATTENTION, "D", "E", "C"),
    peers=whole_peers,
    problem=ReweightedProblem,
    cost=reweighted_attention_cost,
    model_tensors=8 + 3,
)
OPERATORS = {
    operator.name: operator
    for operator in (
        WEIGHTED_ATTENTION,
        TOKEN_RELEVANCE,
        TOKEN_WEIGHTS,
        REWEIGHTED_ATTENTION,
        ATTENTION_STATISTICS,
    )
}
