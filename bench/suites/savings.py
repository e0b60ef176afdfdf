"""The worth of each saving of the few-shot engine: a step, or classifying, without it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.cases import Case
from bench.clip_model import DEFAULT_MODEL, ClipSizes, load_sizes
from bench.settings import OURS, Settings
from bench.shapes import Point

from .common import LAST, Measure
from .step import (
    RunSteps,
    StepImplementation,
    StepProblem,
    own_training,
    require_open_clip,
    smallest_step_points,
    step_case,
    train,
    without_saving,
)
from .step_timing import StepRun, measure_for, measure_on_cpu

if TYPE_CHECKING:
    from bench.training import Training


_ON_GPU_ONLY = ("step_graph",)
_OF_CLASSIFYING = ("shared_text_pass", "image_batches")
_OF_BOTH = ("cut_prompts", "class_token_only")


@dataclass(frozen=True)
class _Part:
    """A part of an episode, and the savings that are left out of it one at a time."""

    name: str
    direction: str
    run: RunSteps
    measure: Measure
    savings: tuple[str, ...]
    sizes: dict[str, int]


def savings_cases(settings: Settings) -> list[Case]:
    require_open_clip()
    sizes = load_sizes(settings.model or DEFAULT_MODEL)
    return [
        _case(part, point, sizes, settings)
        for point in smallest_step_points(settings)
        for part in _parts(point, settings)
        if settings.wants(part.direction)
    ]


def _parts(point: Point, settings: Settings) -> list[_Part]:
    from bench.without import SAVINGS

    left_out = _OF_CLASSIFYING if settings.device == "cuda" else _OF_CLASSIFYING + _ON_GPU_ONLY
    of_steps = tuple(name for name in SAVINGS if name not in left_out)
    queries = settings.ways * settings.queries
    return [
        _Part("fine-tuning step", "forward+backward", train, measure_for(settings), of_steps, {}),
        _Part(
            "classifying",
            "forward",
            functools.partial(_classify, queries),
            measure_on_cpu,  # results are on the CPU in the end, so any device has finished
            _OF_CLASSIFYING + _OF_BOTH,
            {"Q": queries},
        ),
    ]


def _case(part: _Part, point: Point, sizes: ClipSizes, settings: Settings) -> Case:
    training, reason = own_training(point, settings)
    chosen = {f"{OURS}{training.runtime.backend}": ""}
    chosen |= {f"without {name}": name for name in part.savings}
    competing = [
        StepImplementation(name, training, without_saving(saving, part.run), reason).competing()
        for name, saving in chosen.items()
    ]
    case = step_case(part.name, point, sizes, settings, competing, priority=LAST)
    return replace(
        case,
        suite="savings",
        shape=dict(case.shape) | part.sizes,
        direction=part.direction,
        measure=part.measure,
        cost=None,
    )


def _classify(queries: int, problem: StepProblem, training: Training, steps: int) -> StepRun:
    """Time from the end of a one-step training to the logits of the support and query images."""
    copies = -(-queries // len(problem.images))
    images = problem.images.repeat(copies, 1, 1, 1)[:queries]
    run = train(problem, training, 1, images)
    return StepRun(run.first_losses, [run.ends[-1], time.perf_counter()])
