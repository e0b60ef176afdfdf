"""The operators that are measured: their tensors, their peers, what is right and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from .counting import (
    FLOAT32_BYTES,
    Cost,
    attention_cost,
    relevance_cost,
    reweighted_attention_cost,
    token_weights_cost,
)
from .peers import attention_peers, operator_peers, relevance_peers, token_weights_peers
from .peers.common import Forward, Peer
from .problems import AttentionProblem, OperatorProblem, RelevanceProblem, directed
from .settings import DIRECTIONS, DTYPES, Settings
from .shapes import JOINT_WIDTH, PREFIX_TOKENS, Point
from .timing import Call


class Operator(ABC):
    """An operator; a problem is the tensors of one shape that its peers are built for."""

    name: str
    directions: tuple[str, ...] = ("forward",)

    @abstractmethod
    def peers(self, settings: Settings) -> list[Peer]:
        """The implementations that compete."""

    @abstractmethod
    def shape(self, point: Point) -> dict[str, int]:
        """The sizes that matter to it, as in the records."""

    @abstractmethod
    def problem(self, point: Point, device: str) -> Any:
        """Tensors of this shape."""

    @abstractmethod
    def verify(self, peer: Peer, forward: Forward, problem: Any, direction: str) -> None:
        """Raise WrongResultError unless the peer computes the operator."""

    @abstractmethod
    def call(self, forward: Forward, problem: Any, direction: str) -> Call:
        """The call that is measured."""

    @abstractmethod
    def cost(self, point: Point, direction: str) -> Cost:
        """Useful work of a call."""

    @abstractmethod
    def tensor_bytes(self, point: Point) -> int:
        """Estimate of what inputs, outputs and gradients take."""


class WeightedAttention(Operator):
    name = "weighted_attention"
    directions = DIRECTIONS

    def peers(self, settings: Settings) -> list[Peer]:
        return attention_peers(settings)

    def shape(self, point: Point) -> dict[str, int]:
        return {"B": point.images, "H": point.heads, "L": point.length, "d": point.width}

    def problem(self, point: Point, device: str) -> AttentionProblem:
        return AttentionProblem(
            point.images, point.heads, point.length, point.width, DTYPES[point.dtype], device
        )

    def verify(
        self, peer: Peer, forward: Forward, problem: AttentionProblem, direction: str
    ) -> None:
        problem.verify(forward, direction, is_weighted=peer.is_weighted)

    def call(self, forward: Forward, problem: AttentionProblem, direction: str) -> Call:
        return directed(forward, direction, problem.leaves, problem.grad_output)

    def cost(self, point: Point, direction: str) -> Cost:
        sizes = (point.images, point.heads, point.length, point.width)
        return attention_cost(*sizes, _itemsize(point), direction)

    def tensor_bytes(self, point: Point) -> int:
        # Query, key, value, output and its gradient, and the gradients of the first three.
        return 8 * point.images * point.length * point.model_width * _itemsize(point)


class _OfTokens(Operator):
    """An operator on tokens and classes."""

    def shape(self, point: Point) -> dict[str, int]:
        return {
            "B": point.images,
            "L": point.length,
            "D": point.model_width,
            "E": JOINT_WIDTH,
            "C": point.num_classes,
        }

    def problem(self, point: Point, device: str) -> RelevanceProblem:
        return RelevanceProblem(
            point.images,
            point.length,
            point.model_width,
            point.num_classes,
            DTYPES[point.dtype],
            device,
        )

    def call(self, forward: Forward, problem: RelevanceProblem, direction: str) -> Call:
        return directed(forward, direction, (), None)

    def tensor_bytes(self, point: Point) -> int:
        # Tokens, what the norm makes of them, and features.
        return 3 * point.images * point.length * point.model_width * _itemsize(point)


class TokenRelevance(_OfTokens):
    name = "token_relevance"

    def peers(self, settings: Settings) -> list[Peer]:
        return relevance_peers(settings)

    def verify(
        self, peer: Peer, forward: Forward, problem: RelevanceProblem, direction: str
    ) -> None:
        problem.verify_relevance(forward)

    def cost(self, point: Point, direction: str) -> Cost:
        sizes = (point.model_width, JOINT_WIDTH, point.num_classes, _itemsize(point))
        return relevance_cost(point.images, point.length - PREFIX_TOKENS, *sizes)


class TokenWeights(_OfTokens):
    name = "token_weights"

    def peers(self, settings: Settings) -> list[Peer]:
        return token_weights_peers(settings)

    def verify(
        self, peer: Peer, forward: Forward, problem: RelevanceProblem, direction: str
    ) -> None:
        problem.verify_weights(forward)

    def cost(self, point: Point, direction: str) -> Cost:
        sizes = (point.model_width, JOINT_WIDTH, point.num_classes, _itemsize(point))
        patches = point.length - PREFIX_TOKENS
        return token_weights_cost(point.images, patches, PREFIX_TOKENS, *sizes)


class ReweightedAttention(Operator):
    name = "reweighted_attention"
    directions = ("forward", "forward+backward")

    def __init__(self) -> None:
        self._attention, self._tokens = WeightedAttention(), TokenWeights()

    def peers(self, settings: Settings) -> list[Peer]:
        return operator_peers(settings)

    def shape(self, point: Point) -> dict[str, int]:
        return self._attention.shape(point) | self._tokens.shape(point)

    def problem(self, point: Point, device: str) -> OperatorProblem:
        return OperatorProblem(
            self._attention.problem(point, device), self._tokens.problem(point, device)
        )

    def verify(
        self, peer: Peer, forward: Forward, problem: OperatorProblem, direction: str
    ) -> None:
        problem.verify(forward, forward.with_weights, direction)

    def call(self, forward: Forward, problem: OperatorProblem, direction: str) -> Call:
        return self._attention.call(forward, problem.attention, direction)

    def cost(self, point: Point, direction: str) -> Cost:
        return reweighted_attention_cost(
            point.images,
            point.heads,
            point.length,
            point.width,
            PREFIX_TOKENS,
            JOINT_WIDTH,
            point.num_classes,
            _itemsize(point),
            direction,
        )

    def tensor_bytes(self, point: Point) -> int:
        return self._attention.tensor_bytes(point) + self._tokens.tensor_bytes(point)


WEIGHTED_ATTENTION = WeightedAttention()
TOKEN_RELEVANCE = TokenRelevance()
TOKEN_WEIGHTS = TokenWeights()
REWEIGHTED_ATTENTION = ReweightedAttention()
OPERATORS = {
    operator.name: operator
    for operator in (WEIGHTED_ATTENTION, TOKEN_RELEVANCE, TOKEN_WEIGHTS, REWEIGHTED_ATTENTION)
}


def score_bytes(point: Point) -> int:
    """Size of one (B, H, L, L) tensor of float32."""
    return point.images * point.heads * point.length**2 * FLOAT32_BYTES


def _itemsize(point: Point) -> int:
    return DTYPES[point.dtype].itemsize
