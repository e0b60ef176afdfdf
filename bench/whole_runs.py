"""Whole runs of few-shot episodes, from image files to accuracies, by us and as published.

And how long ``tir-finetune`` takes to its first training step.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.training import Training
from tir_kernels.fewshot import finetune_episodes

from . import published
from .workload import Workload

Say = Callable[[str], None]

_ROOT = Path(__file__).parents[1]
_START_UP_LIMIT = 300  # seconds; a run that takes longer hangs


@dataclass(frozen=True)
class RunOutcome:
    """The results and times of a whole run.

    Attributes:
        seconds: Per episode; reading the images is part of it, and of the published program's also
            loading the model.
        first_losses: One an episode.
        accuracies: One an episode, of the query images.
        queries: Query images of an episode.
    """

    seconds: float
    first_losses: list[float]
    accuracies: list[float]
    queries: int


def run_ours(
    workload: Workload, training: Training, episodes: int, at_once: int, say: Say
) -> RunOutcome:
    """A whole run of ours; the model is loaded once, before the clock starts.

    Args:
        workload: What is run.
        training: Settings, of which ``shots`` counts too.
        episodes: Their number.
        at_once: Most of them that are trained at once.
        say: Is called with a line of progress.
    """
    model, reader = workload.model, workload.reader()

    def train(numbers: Sequence[int]) -> Iterator[tuple[float, float]]:
        device = training.runtime.device
        chosen = [workload.load(reader, n, training.shots, device) for n in numbers]
        results = finetune_episodes(
            model.model, model.tokenizer, chosen, training.method, runtime=training.runtime
        )
        for episode, result in zip(chosen, results, strict=True):
            if isinstance(result, Exception):
                raise result
            right = result.query_logits.argmax(1) == episode.query_labels
            yield result.losses[0], right.float().mean().item()

    return _run(workload, episodes, at_once, train, say)


def run_published(workload: Workload, training: Training, episodes: int, say: Say) -> RunOutcome:
    """A whole run of the published program, which starts over at each episode."""
    folder = workload.model_folder

    def train(numbers: Sequence[int]) -> Iterator[tuple[float, float]]:
        files = workload.files(numbers[0], training.shots)
        result = published.run_episode(folder, files, training)
        yield result.losses[0], result.accuracy

    return _run(workload, episodes, 1, train, say)


def _run(
    workload: Workload,
    episodes: int,
    at_once: int,
    train: Callable[[Sequence[int]], Iterator[tuple[float, float]]],
    say: Say,
) -> RunOutcome:
    """Some episodes after others; ``train`` gives the first loss and the accuracy of each."""
    losses: list[float] = []
    accuracies: list[float] = []
    start = time.perf_counter()
    for first in range(0, episodes, at_once):
        for loss, accuracy in train(range(first, min(first + at_once, episodes))):
            losses.append(loss)
            accuracies.append(accuracy)
        mean = statistics.fmean(accuracies)
        say(f"{len(accuracies)} of {episodes} episodes, accuracy {mean:.1%}")
    seconds = (time.perf_counter() - start) / episodes
    return RunOutcome(seconds, losses, accuracies, workload.queries)


def start_up_seconds(workload: Workload, training: Training, ways: int, out: Path) -> float:
    """Time from the start of ``tir-finetune run`` to the end of its first training step.

    Raises:
        RuntimeError: It took no step, or too long; the message says why.
    """
    options = {
        "data": workload.data_folder,
        "model": workload.model_folder,
        "out": out,
        "ways": ways,
        "shots": training.shots,
        "queries": 1,
        "episodes": 1,
        "method": training.method.name,
        "precision": training.runtime.precision,
        "device": training.runtime.device,
        "backend": training.runtime.backend,
    }
    command = [sys.executable, "-m", "bench.first_step", str(torch.get_num_threads()), "run"]
    command += [f"--{name}={value}" for name, value in options.items()]
    start = time.perf_counter()
    try:
        result = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=_START_UP_LIMIT
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no training step within {_START_UP_LIMIT} s") from error
    seconds = time.perf_counter() - start
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"tir-finetune ended with {result.returncode}: {lines[-1]}")
    return seconds
