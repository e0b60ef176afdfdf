"""The time of a fine-tuning step, from runs of several."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.cases import Measurement
from bench.settings import Settings

from .common import Measure

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


def measure_for(settings: Settings) -> Measure:
    if settings.device == "cuda":
        return _measure_on_gpu
    return _measure_quickly if settings.quick else measure_on_cpu


def measure_on_cpu(
    runs: Sequence[Callable[[int], StepRun]], seconds: float, *, steps: int = 4, min_rounds: int = 2
) -> list[Measurement]:
    """Median time of a step, of runs of a few steps that take turns."""
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - start < seconds * len(runs):
        for run, found in zip(runs, times, strict=True):
            found += run(steps).seconds
        rounds += 1
    return [{"ms": statistics.median(found) * 1e3} for found in times]


_measure_quickly = functools.partial(measure_on_cpu, steps=2, min_rounds=1)


def _measure_on_gpu(
    runs: Sequence[Callable[[int], StepRun]], seconds: float, *, min_rounds: int = 3
) -> list[Measurement]:
    """Median over rounds of what more steps add to a run; runs take turns."""
    few, many = _STEPS_ON_GPU
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - start < seconds * len(runs):
        for run, found in zip(runs, times, strict=True):
            short, long = (_whole_seconds(run, steps) for steps in (few, many))
            found.append((long - short) / (many - few))
        rounds += 1
    return [{"ms": statistics.median(found) * 1e3} for found in times]


def _whole_seconds(run: Callable[[int], StepRun], steps: int) -> float:
    """Seconds that the whole run takes per episode.

    On a GPU losses come when they come and the first steps prepare a graph for the others, so that
    single steps cannot be told apart.
    """
    torch.cuda.synchronize()
    start = time.perf_counter()
    episodes = len(run(steps).first_losses)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / episodes
