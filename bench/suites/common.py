"""The case of an operator at a shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from bench.cases import Case, Implementation
from bench.counting import score_bytes
from bench.operators import Operator
from bench.peers.common import Peer
from bench.problems import Forward
from bench.settings import Settings
from bench.shapes import Point
from bench.timing import Call, clock_for, timed

# Priorities: some rows of every target, the other rows that have one, and the rest.
FIRST, SECOND, THIRD, LAST = range(4)

# (peer, its forward pass, which was found right, the case's problem) -> what is measured
Prepare = Callable[[Peer, Forward, Any], Call]


def operator_case(
    suite: str,
    operator: Operator,
    point: Point,
    direction: str,
    settings: Settings,
    *,
    peers: Sequence[Peer] | None = None,
    prepare: Prepare | None = None,
    priority: int = FIRST,
) -> Case:
    """The case of an operator's peers at one shape.

    Args:
        suite: Its name.
        operator: What is measured.
        point: The shape.
        direction: One of the operator's.
        settings: Of the run.
        peers: Those that take part, in turn; the operator's by default.
        prepare: What of a peer is measured; the call in the direction by default.
        priority: Of the case.
    """

    def implementation(peer: Peer) -> Implementation:
        def prepared(problem: Any) -> Call:
            forward = peer.build(problem)
            problem.verify(forward, direction, is_weighted=peer.is_weighted)
            if prepare is not None:
                return prepare(peer, forward, problem)
            return problem.call(forward, direction)

        reason = peer.unavailable
        if not reason and direction not in peer.directions:
            reason = f"does {' and '.join(peer.directions)} only on this device"
        passes = 1 if direction == "forward" else 2
        scratch = passes * peer.score_tensors * score_bytes(point)
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
        priority=priority,
    )
