"""The case of an operator at a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.cases import Case, Implementation, Measurement
from bench.operators import Operator, score_bytes
from bench.peers.common import Forward, Peer
from bench.settings import Settings
from bench.shapes import Point
from bench.timing import Call, clock_for, median_times

# Priorities: some rows of every target, the other rows that have one, and the rest.
FIRST, SECOND, THIRD, LAST = range(4)

Measure = Callable[[Sequence[Call], float], list[Measurement]]


def operator_case(
    suite: str,
    operator: Operator,
    point: Point,
    direction: str,
    settings: Settings,
    priority: int,
) -> Case:
    """The time of an operator's peers at one shape."""

    def prepare(peer: Peer, forward: Forward, problem: Any) -> Call:
        operator.verify(peer, forward, problem, direction)
        return operator.call(forward, problem, direction)

    return Case(
        suite=suite,
        operator=operator.name,
        device=settings.device,
        dtype=point.dtype,
        shape=operator.shape(point),
        direction=direction,
        make_inputs=lambda: operator.problem(point, settings.device),
        implementations=competing(operator.peers(settings), point, direction, prepare),
        measure=_timed(settings.device),
        cost=operator.cost(point, direction),
        input_bytes=operator.tensor_bytes(point),
        priority=priority,
    )


def competing(
    peers: Sequence[Peer],
    point: Point,
    direction: str,
    prepare: Callable[[Peer, Forward, Any], Call],
) -> list[Implementation]:
    """Peers as implementations of a case.

    Args:
        peers: In the order in which they take turns.
        point: The shape.
        direction: What is measured.
        prepare: (peer, its forward pass, the case's problem) -> the call, after checking it.
    """
    passes = 1 if direction == "forward" else 2

    def implementation(peer: Peer) -> Implementation:
        reason = peer.unavailable
        if not reason and direction not in peer.directions:
            reason = f"does {' and '.join(peer.directions)} only on this device"
        return Implementation(
            peer.name,
            lambda problem: prepare(peer, peer.build(problem), problem),
            reason,
            passes * peer.score_tensors * score_bytes(point),
        )

    return [implementation(peer) for peer in peers]


def _timed(device: str) -> Measure:
    def measure(calls: Sequence[Call], seconds: float) -> list[Measurement]:
        times = median_times(clock_for(device, calls), seconds * len(calls))
        return [{"ms": time} for time in times]

    return measure
