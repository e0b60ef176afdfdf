"""Peak extra memory of one call of each operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.cases import Case, Measurement
from bench.memory_probe import added_in_new_process, added_on_gpu
from bench.operators import (
    OPERATORS,
    REWEIGHTED_ATTENTION,
    TOKEN_WEIGHTS,
    WEIGHTED_ATTENTION,
    Operator,
)
from bench.peers.common import Forward, Peer
from bench.settings import Settings
from bench.shapes import Point, points
from bench.timing import Call

from .common import FIRST, competing

_SIZES = ("lengths", "widths", "heads", "classes", "dtypes")
_SMALL_LENGTH = 8


def memory_cases(settings: Settings) -> list[Case]:
    return [
        _case(operator, point, direction, settings)
        for point in points("memory", settings, varies=_SIZES)
        for operator in (REWEIGHTED_ATTENTION, WEIGHTED_ATTENTION, TOKEN_WEIGHTS)
        for direction in _directions(operator, settings)
    ]


def _directions(operator: Operator, settings: Settings) -> list[str]:
    """Whole calls: a backward pass alone works on memory that its forward pass took."""
    whole = [d for d in operator.directions if d != "backward" and settings.wants(d)]
    return whole[-1:] if settings.quick and settings.directions is None else whole


def _case(operator: Operator, point: Point, direction: str, settings: Settings) -> Case:
    def prepare(peer: Peer, forward: Forward, problem: Any) -> Call:
        operator.verify(peer, forward, problem, direction)
        if settings.device == "cuda":
            call = operator.call(forward, problem, direction)
            return functools.partial(added_on_gpu, call)
        rebuild = functools.partial(_rebuild, operator.name, peer.name, point, direction, settings)
        return functools.partial(added_in_new_process, rebuild, settings.threads)

    peers = [p for p in operator.peers(settings) if p.is_weighted and not p.is_compiled]
    return Case(
        suite="memory",
        operator=operator.name,
        device=settings.device,
        dtype=point.dtype,
        shape=operator.shape(point),
        direction=direction,
        make_inputs=lambda: operator.problem(point, settings.device),
        implementations=competing(peers, point, direction, prepare),
        measure=_measure,
        input_bytes=operator.tensor_bytes(point),
        priority=FIRST,
    )


def _measure(probes: Sequence[Call], seconds: float) -> list[Measurement]:
    def measured(probe: Call) -> Measurement:
        try:
            return {"mib": probe()}
        except RuntimeError as error:
            return {"skipped": str(error)}

    return [measured(probe) for probe in probes]


def _rebuild(
    operator_name: str,
    peer_name: str,
    point: Point,
    direction: str,
    settings: Settings,
    is_small: bool,
) -> Call:
    """The call of a peer, built anew in another process."""
    operator = OPERATORS[operator_name]
    if is_small:
        point = replace(point, length=min(_SMALL_LENGTH, point.length))
    (peer,) = (p for p in operator.peers(settings) if p.name == peer_name)
    problem = operator.problem(point, settings.device)
    return operator.call(peer.build(problem), problem, direction)
