"""The worth of each saving of the few-shot engine: a step, or classifying, without it."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

from bench.cases import Case
from bench.plain_clip import Training
from bench.settings import OURS, STEP, Settings
from bench.shapes import Point
from bench.without import SAVINGS, without

from .operators import LAST
from .step import (
    RunSteps,
    StepImplementation,
    StepProblem,
    StepRun,
    measure_on_cpu,
    own_training,
    smallest_step_points,
    step_case,
    train,
)

_ON_GPU_ONLY = {"step_graph"}
_OF_CLASSIFYING = {"shared_text_pass", "image_batches"}
_OF_BOTH = {"cut_prompts", "class_token_only"}


def savings_cases(settings: Settings) -> list[Case]:
    left_out = _OF_CLASSIFYING | (_ON_GPU_ONLY if settings.device == "cpu" else set())
    queries = settings.ways * settings.queries
    cases = []
    for point in smallest_step_points(settings):
        if settings.wants("forward+backward"):
            cases.append(_case(STEP, train, set(SAVINGS) - left_out, point, settings))
        if settings.wants("forward"):
            run, savings = functools.partial(_classify, queries), _OF_CLASSIFYING | _OF_BOTH
            case = _case("classifying", run, savings, point, settings)
            shape = {**case.shape, "Q": queries}
            # Results are on the CPU in the end, so that any device has finished.
            cases.append(replace(case, shape=shape, direction="forward", measure=measure_on_cpu()))
    return cases


def _case(name: str, run: RunSteps, savings: set[str], point: Point, settings: Settings) -> Case:
    """A part of an episode, as it is and without one saving at a time."""
    training, reason = own_training(point, settings)
    chosen = {f"{OURS}{training.runtime.backend}": run}
    for saving in SAVINGS:
        if saving in savings:
            chosen[f"without {saving}"] = functools.partial(_without, saving, run)
    competing = [StepImplementation(name, training, run, reason) for name, run in chosen.items()]
    case = step_case(name, point, settings, competing)
    return replace(case, suite="savings", cost=None, priority=LAST)


def _without(
    saving: str, run: RunSteps, problem: StepProblem, training: Training, steps: int
) -> StepRun:
    with without(training.method, saving):
        return run(problem, training, steps)


def _classify(queries: int, problem: StepProblem, training: Training, steps: int) -> StepRun:
    """Time from the end of a one-step training to the logits of the support and query images."""
    copies = -(-queries // len(problem.images))
    images = problem.images.repeat(copies, 1, 1, 1)[:queries]
    run = train(problem, training, 1, images)
    return StepRun(run.first_losses, [run.ends[-1], time.perf_counter()])
