"""Re-weighted attention as a whole, and what the host takes for one call of each operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.cases import Case
from bench.operators import REWEIGHTED_ATTENTION, TOKEN_WEIGHTS, WEIGHTED_ATTENTION, Operator
from bench.peers.attention import default_sdpa
from bench.peers.common import EAGER
from bench.settings import HOST_TIME, OURS, Settings
from bench.shapes import Point, points
from bench.timing import Call, Measurement, host_clock, timed

from .common import FIRST, LAST, SECOND, operator_case

_TINY = Point(length=8, head_dim=16, images=1, heads=1, num_classes=2, dtype="")


def operator_cases(settings: Settings) -> list[Case]:
    whole = REWEIGHTED_ATTENTION
    cases = [
        operator_case(
            "operator", whole, point, direction, settings, priority=_priority(point, direction)
        )
        for point in points("operator", settings)
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
    # Our operators, the plain formula and PyTorch's attention, called without naming a backend.
    peers = [p for p in operator.peers(settings) if p.name.startswith(OURS) or p.name == EAGER]
    if operator is WEIGHTED_ATTENTION:
        peers.append(default_sdpa())
    case = operator_case(
        "operator",
        operator,
        replace(_TINY, dtype="float32" if settings.device == "cpu" else "bfloat16"),
        "forward",
        settings,
        peers=peers,
        prepare=lambda peer, forward, problem: forward,
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
