"""The time of a fine-tuning step, from runs of several."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.settings import Settings
from bench.timing import Measure, timed

_STEPS_ON_GPU = (6, 26)  # both longer than what goes before a graph


@dataclass(frozen=True)
class StepRun:
    """The first loss of each episode, and when each step was over, by ``time.perf_counter()``."""

    first_losses: list[float]
    ends: list[float]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step but the first, per episode."""
        episodes = len(self.first_losses)
        return [(end - start) / episodes for start, end in itertools.pairwise(self.ends)]


@dataclass
class _StepClock:
    """Time of a step, in runs of a few steps; none of them is there to warm up."""

    runs: Sequence[Callable[[int], StepRun]]
    seconds: Callable[[Callable[[int], StepRun]], float]

    def round(self) -> list[float]:
        gc.collect()  # a run leaves cycles behind, and nobody else collects them meanwhile
        return [1e3 * self.seconds(run) for run in self.runs]


def measure_for(settings: Settings) -> Measure:
    if settings.device == "cuda":
        return timed(functools.partial(_StepClock, seconds=_seconds_on_gpu), min_rounds=3)
    return measure_on_cpu(2, 1) if settings.quick else measure_on_cpu()


def measure_on_cpu(steps: int = 4, min_rounds: int = 2) -> Measure:
    """Median time of a step, of runs of a few steps that take turns."""

    def seconds(run: Callable[[int], StepRun]) -> float:
        return statistics.median(run(steps).seconds)

    return timed(functools.partial(_StepClock, seconds=seconds), min_rounds)


def _seconds_on_gpu(run: Callable[[int], StepRun]) -> float:
    """Seconds per episode that each further step adds to a run.

    On a GPU losses come when they come and the first steps prepare a graph for the others, so that
    single steps cannot be told apart.
    """
    few, many = _STEPS_ON_GPU
    short, long = (_whole_seconds(run, steps) for steps in (few, many))
    return (long - short) / (many - few)


def _whole_seconds(run: Callable[[int], StepRun], steps: int) -> float:
    """Seconds that the whole run takes per episode."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    episodes = len(run(steps).first_losses)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / episodes
