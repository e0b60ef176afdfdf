"""Re-weighted attention as a whole, and what the host takes for one call of each operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.cases import Case, Measurement
from bench.operators import (
    REWEIGHTED_ATTENTION,
    TOKEN_WEIGHTS,
    WEIGHTED_ATTENTION,
    Operator,
)
from bench.peers.attention import default_sdpa
from bench.peers.common import EAGER, Peer
from bench.problems import Forward
from bench.settings import OURS, Settings
from bench.shapes import Point, points
from bench.timing import Call, HostClock, median_times

from .common import FIRST, LAST, SECOND, operator_case

HOST_TIME = "host time"

_SIZES = ("lengths", "widths", "heads", "classes", "dtypes")
_TINY = Point(length=8, head_dim=16, images=1, heads=1, num_classes=2, dtype="")


def operator_cases(settings: Settings) -> list[Case]:
    whole = REWEIGHTED_ATTENTION
    cases = [
        operator_case(
            "operator", whole, point, direction, settings, priority=_priority(point, direction)
        )
        for point in points("operator", settings, varies=_SIZES)
        for direction in whole.directions
        if settings.wants(direction)
    ]
    if settings.wants("forward"):
        cases += [
            _host_time_case(operator, settings)
            for operator in (whole, WEIGHTED_ATTENTION, TOKEN_WEIGHTS)
        ]
    return cases


def _priority(point: Point, direction: str) -> int:
    if direction != "forward+backward" or point.dtype != "bfloat16":
        return LAST
    return FIRST if point.length == 197 and point.num_classes == 5 else SECOND


def _host_time_case(operator: Operator, settings: Settings) -> Case:
    """Host time of one call, on tensors so small that their arithmetic takes none.

    Query, key and value require gradients, as in training: to record the call for the backward pass
    is part of it.
    """

    def forward_alone(peer: Peer, forward: Forward, problem: Any) -> Call:
        return forward

    # Our operators, the plain formula and PyTorch's attention, called without naming a backend.
    peers = [p for p in operator.peers(settings) if p.name.startswith(OURS) or p.name == EAGER]
    if operator is WEIGHTED_ATTENTION:
        peers.append(default_sdpa())
    point = replace(_TINY, dtype="float32" if settings.device == "cpu" else "bfloat16")
    case = operator_case(
        "operator", operator, point, "forward", settings, peers=peers, prepare=forward_alone
    )
    return replace(
        case,
        operator=f"{operator.name} {HOST_TIME}",
        measure=_host_timed(settings.device),
        cost=None,
        input_bytes=0,
    )


def _host_timed(device: str) -> Callable[[Sequence[Call], float], list[Measurement]]:
    def measure(calls: Sequence[Call], seconds: float) -> list[Measurement]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # handing work to threads is not the cost of a call
        try:
            times = median_times(HostClock(calls, device), seconds * len(calls))
        finally:
            torch.set_num_threads(threads)
        return [{"ms": time} for time in times]

    return measure
