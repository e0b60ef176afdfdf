"""The operators that are measured, and their suites: a case for each shape and direction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import tir_kernels
from bench import counting
from bench.cases import Case, Implementation
from bench.counting import Cost
from bench.formulas import plain_relevance, plain_statistics, plain_token_weights
from bench.peers import EAGER, MASKED, Peer, attention_peers, peers_of, sdpa_peer, whole_peers
from bench.problems import (
    AttentionProblem,
    Problem,
    RelevanceProblem,
    ReweightedProblem,
    StatisticsProblem,
    TokenWeightsProblem,
)
from bench.settings import DIRECTIONS, HOST_TIME, OURS, Settings
from bench.shapes import Point, points
from bench.timing import Call, Measurement, clock_for, host_clock, timed


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
    cost=counting.attention_cost,
    # Query, key, value, output and its gradient, and the gradients of the first three.
    model_tensors=8,
)
ATTENTION_STATISTICS = Operator(
    name="attention_statistics",
    directions=("forward",),
    sizes=_OF_ATTENTION,
    peers=peers_of(tir_kernels.attention_statistics, plain_statistics, has_scores=True),
    problem=StatisticsProblem,
    cost=lambda point, direction: counting.statistics_cost(point),
    model_tensors=3,  # query, key and, unused, value
)
TOKEN_RELEVANCE = Operator(
    name="token_relevance",
    directions=("forward",),
    sizes=_OF_TOKENS,
    peers=peers_of(tir_kernels.token_relevance, plain_relevance),
    problem=RelevanceProblem,
    cost=lambda point, direction: counting.relevance_cost(point),
    model_tensors=3,  # tokens, what the norm makes of them, and features
)
TOKEN_WEIGHTS = replace(
    TOKEN_RELEVANCE,
    name="token_weights",
    peers=peers_of(tir_kernels.token_weights, plain_token_weights),
    problem=TokenWeightsProblem,
    cost=lambda point, direction: counting.token_weights_cost(point),
)
REWEIGHTED_ATTENTION = Operator(
    name="reweighted_attention",
    directions=("forward", "forward+backward"),
    sizes=(*_OF_ATTENTION, "D", "E", "C"),
    peers=whole_peers,
    problem=ReweightedProblem,
    cost=counting.reweighted_attention_cost,
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

# Priorities: some rows of every target, the other rows that have one, and the rest.
FIRST, SECOND, THIRD, LAST = range(4)

_TINY = Point(length=8, head_dim=16, images=1, heads=1, num_classes=2, dtype="")


def attention_cases(settings: Settings) -> list[Case]:
    """Weighted attention against everything PyTorch has for it."""
    directions = WEIGHTED_ATTENTION.directions
    if settings.device == "cpu" and settings.directions is None:
        directions = ("forward", "forward+backward")

    def priority(point: Point, direction: str) -> int:
        heads = point.images * point.heads
        is_main = point.dtype == "bfloat16" and point.head_dim == 64 and point.length < 1024
        if not is_main or heads < 300 or direction == "forward+backward":
            return LAST
        return FIRST if heads == 768 else SECOND

    operator = replace(WEIGHTED_ATTENTION, directions=directions)
    return _cases("attention", operator, settings, priority)


def statistics_cases(settings: Settings) -> list[Case]:
    """Attention statistics beside attention that is written out and summed."""
    found = _cases("attention", ATTENTION_STATISTICS, settings, lambda *_: LAST)
    return [replace(case, suite="statistics") for case in found]


def relevance_cases(settings: Settings) -> list[Case]:
    """Relevance, and the token weights that follow from it."""

    def priority(point: Point, direction: str) -> int:
        is_main = point.num_classes == 5 and point.dtype == "bfloat16" and point.length == 197
        return FIRST if is_main else LAST

    return _cases("relevance", TOKEN_WEIGHTS, settings, priority) + _cases(
        "relevance", TOKEN_RELEVANCE, settings, lambda *_: LAST
    )


def operator_cases(settings: Settings) -> list[Case]:
    """Re-weighted attention as a whole, and what the host takes for one call of each operator."""

    def priority(point: Point, direction: str) -> int:
        if direction != "forward+backward" or point.dtype != "bfloat16":
            return LAST
        return FIRST if point.length == 197 and point.num_classes == 5 else SECOND

    cases = _cases("operator", REWEIGHTED_ATTENTION, settings, priority)
    if settings.wants("forward"):
        for operator in (REWEIGHTED_ATTENTION, WEIGHTED_ATTENTION, TOKEN_WEIGHTS):
            cases.append(_host_time_case(operator, settings))
    return cases


def _cases(
    suite: str, operator: Operator, settings: Settings, priority: Callable[[Point, str], int]
) -> list[Case]:
    return [
        replace(
            operator_case(suite, operator, point, direction, settings),
            priority=priority(point, direction),
        )
        for point in points(suite, settings)
        for direction in operator.directions
        if settings.wants(direction)
    ]


def _host_time_case(operator: Operator, settings: Settings) -> Case:
    """Host time of one call, on tensors so small that their arithmetic takes none.

    Query, key and value require gradients, as in training: to record the call for the backward pass
    is part of it.
    """
    # Our operators, the plain formula and PyTorch's attention, called without naming a backend.
    peers = [p for p in operator.peers(settings) if p.name.startswith(OURS) or p.name == EAGER]
    if operator is WEIGHTED_ATTENTION:
        peers.append(sdpa_peer(MASKED))
    case = operator_case(
        "operator",
        operator,
        replace(_TINY, dtype="float32" if settings.device == "cpu" else "bfloat16"),
        "forward",
        settings,
        peers=peers,
        keeps_graph=True,
    )

    def measure(calls: Sequence[Call], seconds: float) -> list[Measurement]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # handing work to threads is not the cost of a call
        try:
            return timed(lambda calls: host_clock(calls, settings.device))(calls, seconds)
        finally:
            torch.set_num_threads(threads)

    name = f"{operator.name} {HOST_TIME}"
    return replace(case, operator=name, measure=measure, cost=None, input_bytes=0)


def operator_case(
    suite: str,
    operator: Operator,
    point: Point,
    direction: str,
    settings: Settings,
    *,
    peers: Sequence[Peer] | None = None,
    keeps_graph: bool = False,
) -> Case:
    """The case of an operator's peers at one shape, of priority ``FIRST``.

    Args:
        suite: Its name.
        operator: What is measured.
        point: The shape.
        direction: One of the operator's.
        settings: Of the run.
        peers: Those that take part, in turn; the operator's by default.
        keeps_graph: Whether a forward pass also records what a backward pass would need.
    """

    def implementation(peer: Peer) -> Implementation:
        def prepared(problem: Any) -> Call:
            forward = peer.build(problem)
            problem.verify(forward, direction, is_weighted=peer.is_weighted)
            return forward if keeps_graph else problem.call(forward, direction)

        reason = peer.unavailable
        if not reason and direction not in peer.directions:
            reason = f"does {' and '.join(peer.directions)} only on this device"
        passes = 1 if direction == "forward" else 2
        scratch = passes * peer.score_tensors * counting.score_bytes(point)
        return Implementation(peer.name, prepared, reason, scratch)

    competing = operator.peers(settings) if peers is None else peers
    return Case(
        suite=suite,
        operator=operator.name,
        device=settings.device,
        dtype=point.dtype,
        shape=point.sizes(operator.sizes),
        direction=direction,
        make_inputs=lambda: operator.problem(point, settings.device),
        implementations=[implementation(peer) for peer in competing],
        measure=timed(functools.partial(clock_for, settings.device)),
        cost=operator.cost(point, direction),
        input_bytes=operator.tensor_bytes(point),
        priority=FIRST,
    )
