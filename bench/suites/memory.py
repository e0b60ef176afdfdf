"""Peak extra memory, outputs included, of a call of each operator and of fine-tuning steps."""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Implementation
from bench.settings import OURS, PUBLISHED, READABLE, STEP, Settings
from bench.shapes import Point, points
from bench.timing import Call, attempts
from tir_kernels.files import MIB

from .operators import (
    OPERATORS,
    REWEIGHTED_ATTENTION,
    SECOND,
    TOKEN_WEIGHTS,
    WEIGHTED_ATTENTION,
    Operator,
    operator_case,
)

_SMALL_LENGTH = 8


def memory_cases(settings: Settings) -> list[Case]:
    cases = [
        _case(operator, point, direction, settings)
        for point in points("memory", settings)
        for operator in (REWEIGHTED_ATTENTION, WEIGHTED_ATTENTION, TOKEN_WEIGHTS)
        for direction in _directions(operator, settings)
    ]
    if settings.wants("forward+backward") and importlib.util.find_spec("open_clip"):
        cases += _step_cases(settings)
    return cases


def _directions(operator: Operator, settings: Settings) -> list[str]:
    """Whole calls: a backward pass alone works on memory that its forward pass took."""
    whole = [d for d in operator.directions if d != "backward" and settings.wants(d)]
    return whole[-1:] if settings.quick and settings.directions is None else whole


def _case(operator: Operator, point: Point, direction: str, settings: Settings) -> Case:
    peers = [p for p in operator.peers(settings) if p.is_weighted and not p.is_compiled]
    case = operator_case("memory", operator, point, direction, settings, peers=peers)
    rebuild = functools.partial(_rebuild, operator.name, point, direction, settings)
    return _probed(case, rebuild, settings)


def _step_cases(settings: Settings) -> list[Case]:
    """The memory that steps take beside the model and the images; ours, and the published one's."""
    from . import step

    cases = []
    for point in step.smallest_step_points(settings):
        competing = [
            each
            for each in step.implementations(point, "tokens", settings)
            if each.name.startswith((OURS, PUBLISHED)) and each.name != READABLE
        ]
        case = step.step_case(STEP, point, settings, competing)
        rebuild = functools.partial(step.rebuild_step, point, settings)
        probed = _probed(case, rebuild, settings, step.STEPS_OF_PEAK[settings.device])
        cases.append(replace(probed, priority=SECOND))
    return cases


def _probed(case: Case, rebuild: Callable[..., Call], settings: Settings, *arguments: int) -> Case:
    """A case with the memory of each call, at its arguments, in place of its time.

    On a GPU the call itself is watched, else the same call in a process of its own: ``rebuild``
    makes it of the implementation's name and whether its inputs are to be small.
    """

    def probed(each: Implementation) -> Implementation:
        def prepare(problem: Any) -> Call:
            call = functools.partial(each.prepare(problem), *arguments)
            if settings.device == "cuda":
                return lambda: {"mib": added_on_gpu(call)}
            again = functools.partial(rebuild, each.name)
            return lambda: {"mib": added_in_new_process(again, settings.threads)}

        return Implementation(each.name, prepare, each.unavailable, each.scratch_bytes)

    chosen = [probed(each) for each in case.implementations]
    return replace(case, suite="memory", implementations=chosen, measure=attempts, cost=None)


def _rebuild(
    operator_name: str,
    point: Point,
    direction: str,
    settings: Settings,
    peer_name: str,
    is_small: bool,
) -> Call:
    """The call of a peer, built anew in another process."""
    operator = OPERATORS[operator_name]
    if is_small:
        point = replace(point, length=min(_SMALL_LENGTH, point.length))
    (peer,) = (p for p in operator.peers(settings) if p.name == peer_name)
    problem = operator.problem(point, settings.device)
    return problem.call(peer.build(problem), direction)


def added_on_gpu(call: Call) -> float:
    """MiB that a call adds to the memory that tensors occupy on the GPU."""
    call()  # libraries take their workspaces now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    added = torch.cuda.max_memory_allocated() - before
    del result
    return added / MIB


def added_in_new_process(prepare: Callable[[bool], Call], threads: int) -> float:
    """MiB that a call adds to the resident memory of a process of its own.

    Args:
        prepare: A picklable function that allocates the inputs and returns the call; its argument
            says whether they are to be small, for a first call after which everything is loaded
            that is loaded once.
        threads: For the process.

    Raises:
        RuntimeError: The process failed; the message says how.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_added, prepare, threads).result()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _added(prepare: Callable[[bool], Call], threads: int) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    prepare(True)()
    call = prepare(False)
    # The peak starts again from what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _kibibytes("VmRSS")
    result = call()
    added = _kibibytes("VmHWM") - before
    del result
    return added / 1024


def _kibibytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])
