"""Whole runs of few-shot episodes, from image files to accuracies, by us and as published.

And how long ``tir-finetune`` takes to its first training step.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
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
    first_losses: list[float] = []
    accuracies: list[float] = []
    start = time.perf_counter()
    for first in range(0, episodes, at_once):
        numbers = range(first, min(first + at_once, episodes))
        chosen = [
            workload.load(reader, n, training.shots, training.runtime.device) for n in numbers
        ]
        results = finetune_episodes(
            model.model, model.tokenizer, chosen, training.method, runtime=training.runtime
        )
        for episode, result in zip(chosen, results, strict=True):
            if isinstance(result, Exception):
                raise result
            first_losses.append(result.losses[0])
            right = result.query_logits.argmax(1) == episode.query_labels
            accuracies.append(right.float().mean().item())
        say(_progress(accuracies, episodes))
    seconds = (time.perf_counter() - start) / episodes
    return RunOutcome(seconds, first_losses, accuracies, len(right))


def run_published(workload: Workload, training: Training, episodes: int, say: Say) -> RunOutcome:
    """A whole run of the published program, which starts over at each episode."""
    folder = workload.model_folder
    first_losses: list[float] = []
    accuracies: list[float] = []
    start = time.perf_counter()
    for index in range(episodes):
        files = workload.files(index, training.shots)
        result = published.run_episode(folder, files, training)
        first_losses.append(result.losses[0])
        accuracies.append(result.accuracy)
        say(_progress(accuracies, episodes))
    seconds = (time.perf_counter() - start) / episodes
    return RunOutcome(seconds, first_losses, accuracies, len(files.queries))


def _progress(accuracies: list[float], episodes: int) -> str:
    mean = sum(accuracies) / len(accuracies)
    return f"{len(accuracies)} of {episodes} episodes, accuracy {mean:.1%}"


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
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "bench.first_step", str(torch.get_num_threads())]
    start = time.perf_counter()
    try:
        result = subprocess.run(
            [*program, "run", *words],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=_START_UP_LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no training step within {_START_UP_LIMIT} s") from error
    seconds = time.perf_counter() - start
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"tir-finetune ended with {result.returncode}: {lines[-1]}")
    return seconds
