"""Peak extra memory of one call of each operator, and of fine-tuning steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bench.cases import Case, Implementation, Measurement
from bench.clip_model import DEFAULT_MODEL, ClipSizes, load_sizes
from bench.memory_probe import added_in_new_process, added_on_gpu
from bench.operators import (
    OPERATORS,
    REWEIGHTED_ATTENTION,
    TOKEN_WEIGHTS,
    WEIGHTED_ATTENTION,
    Operator,
)
from bench.peers.common import Peer
from bench.problems import Forward
from bench.settings import Settings
from bench.shapes import Point, points
from bench.timing import Call

from .common import SECOND, operator_case
from .step import (
    STEP,
    STEPS_OF_PEAK,
    StepImplementation,
    StepProblem,
    has_open_clip,
    implementations,
    rebuild_step,
    smallest_step_points,
    step_case,
)

_SIZES = ("lengths", "widths", "heads", "classes", "dtypes")
_SMALL_LENGTH = 8


def memory_cases(settings: Settings) -> list[Case]:
    operators = [
        _case(operator, point, direction, settings)
        for point in points("memory", settings, varies=_SIZES)
        for operator in (REWEIGHTED_ATTENTION, WEIGHTED_ATTENTION, TOKEN_WEIGHTS)
        for direction in _directions(operator, settings)
    ]
    if not settings.wants("forward+backward") or not has_open_clip():
        return operators
    sizes = load_sizes(settings.model or DEFAULT_MODEL)
    return operators + [
        _step_case(point, sizes, settings) for point in smallest_step_points(settings)
    ]


def _directions(operator: Operator, settings: Settings) -> list[str]:
    """Whole calls: a backward pass alone works on memory that its forward pass took."""
    whole = [d for d in operator.directions if d != "backward" and settings.wants(d)]
    return whole[-1:] if settings.quick and settings.directions is None else whole


def _case(operator: Operator, point: Point, direction: str, settings: Settings) -> Case:
    def prepare(peer: Peer, forward: Forward, problem: Any) -> Call:
        rebuild = functools.partial(_rebuild, operator.name, peer.name, point, direction, settings)
        return _probe(problem.call(forward, direction), rebuild, settings)

    peers = [p for p in operator.peers(settings) if p.is_weighted and not p.is_compiled]
    case = operator_case(
        "memory", operator, point, direction, settings, peers=peers, prepare=prepare
    )
    return replace(case, measure=_measure, cost=None)


def _step_case(point: Point, sizes: ClipSizes, settings: Settings) -> Case:
    """The case of the memory that a step takes beside the model and the images."""

    def implementation(each: StepImplementation) -> Implementation:
        def prepare(problem: StepProblem) -> Call:
            call = functools.partial(each.prepare(problem), STEPS_OF_PEAK[settings.device])
            rebuild = functools.partial(rebuild_step, each.name, point, sizes, settings)
            return _probe(call, rebuild, settings)

        return Implementation(each.name, prepare, each.unavailable)

    chosen = implementations(point, "tokens", settings, only_targeted=True)
    competing = [implementation(each) for each in chosen]
    case = step_case(STEP, point, sizes, settings, competing, priority=SECOND)
    return replace(case, suite="memory", measure=_measure, cost=None)


def _probe(call: Call, rebuild: Callable[[bool], Call], settings: Settings) -> Call:
    """The memory of a call: on a GPU this one's, else that of the same call in a new process."""
    if settings.device == "cuda":
        return functools.partial(added_on_gpu, call)
    return functools.partial(added_in_new_process, rebuild, settings.threads)


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
    return problem.call(peer.build(problem), direction)
