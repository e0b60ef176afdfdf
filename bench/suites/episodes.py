"""Whole runs of few-shot episodes beside the method's published program, and the start-up time.

A whole run is timed from the images on disk to the answers, in episodes of one data set.
"""

from __future__ import annotations

import functools
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import published
from bench.cases import Case, Implementation
from bench.counting import episode_cost
from bench.plain_clip import Training
from bench.settings import OURS, PUBLISHED, START_UP, WHOLE_RUN, Settings
from bench.timing import Call, Measurement, attempts
from bench.workload import Workload
from tir_kernels.fewshot import Runtime, finetune_episodes
from tir_kernels.fewshot.methods import DEFAULT_METHODS, method_class

from .operators import FIRST, SECOND, THIRD
from .step import (
    StepProblem,
    checked,
    cost_of_step,
    published_precisions,
    verify_first_loss,
    wrong_first_loss,
)

_AUTO = "auto"  # the backend that a run chooses by itself

# (device, quick) -> sizes where none are given
_STEPS = {False: 100, True: 10}
_EPISODES = {("cpu", False): 4, ("cpu", True): 2, ("cuda", False): 16, ("cuda", True): 4}
_PUBLISHED_ON_GPU = 2  # episodes: enough to time what takes as long each time
_SHOTS = {("cpu", False): (5,), ("cpu", True): (5,), ("cuda", False): (5, 1), ("cuda", True): (5,)}
_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
_AT_ONCE = {"cpu": (1,), "cuda": (1, 8)}
_ALLOWED_ERRORS = 4  # standard errors between accuracies of programs with other random numbers
_ROOT = Path(__file__).parents[2]
_START_UP_LIMIT = 300  # seconds; a run that takes longer hangs

# Numbers of episodes -> the first loss and the accuracy of each, as they are done.
Train = Callable[[Sequence[int]], Iterator[tuple[float, float]]]


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


def episode_cases(settings: Settings) -> list[Case]:
    if not settings.wants("forward+backward"):
        return []
    dtypes = settings.dtypes or _DTYPES[settings.device]
    chosen = settings.shots or _SHOTS[settings.device, settings.quick]
    workload = Workload(settings, chosen)
    first = _training(dtypes[0], settings, DEFAULT_METHODS[0], chosen[0])
    return [
        _start_up(workload, first, settings),
        *(
            _whole_run(workload, _training(dtype, settings, method, shots), settings)
            for dtype in dtypes
            for shots in chosen
            for method in DEFAULT_METHODS
        ),
    ]


def _training(dtype: str, settings: Settings, method: str, shots: int) -> Training:
    chosen: Any = method_class(method)
    backend = settings.backends[0] if settings.backends else _AUTO
    return Training(
        chosen(steps=settings.steps or _STEPS[settings.quick]),
        Runtime(settings.device, dtype, backend),
        shots,
    )


def _case(
    name: str, workload: Workload, training: Training, settings: Settings, **rest: Any
) -> Case:
    return Case(
        suite="episodes",
        operator=f"{name} ({workload.name})",
        device=settings.device,
        dtype=training.runtime.precision,
        shape={"ways": settings.ways, "shots": training.shots, **workload.sizes.shape()}
        | rest.pop("sizes", {}),
        direction="forward+backward",
        **rest,
    )


def _whole_run(workload: Workload, training: Training, settings: Settings) -> Case:
    steps, method = training.method.steps, training.method.name
    names = [f"class {number}" for number in range(settings.ways)]
    step, on_queries = (
        cost_of_step(settings.ways * images, names, workload.sizes)
        for images in (training.shots, settings.queries)
    )
    return _case(
        f"{WHOLE_RUN}, {method}",
        workload,
        training,
        settings,
        sizes={"queries": settings.queries, "steps": steps},
        make_inputs=functools.partial(_problem, workload, training),
        implementations=_implementations(workload, training, settings),
        measure=functools.partial(_measure_runs, training.runtime.precision),
        cost=episode_cost(step, steps, on_queries),
        slowdown=0.0,  # how long it takes is for the command line to say
        priority=SECOND if method == DEFAULT_METHODS[0] else THIRD,
    )


def _problem(workload: Workload, training: Training) -> StepProblem:
    """The first episode, for the check of the first loss."""
    model, device = workload.model, training.runtime.device
    episode = workload.load(workload.reader(), 0, training.shots, device)
    labels = episode.support_labels.to(device)
    return StepProblem(
        model.model, model.tokenizer, episode.class_names, episode.support_images, labels
    )


def _implementations(
    workload: Workload, training: Training, settings: Settings
) -> list[Implementation]:
    device = settings.device
    episodes = settings.episodes or _EPISODES[device, settings.quick]
    theirs = settings.published_episodes or (
        episodes if device == "cpu" else min(episodes, _PUBLISHED_ON_GPU)
    )

    def implementation(
        name: str,
        training: Training,
        program: Callable[[Workload, Training], Train],
        count: int,
        at_once: int = 1,
    ) -> Implementation:
        def say(line: str) -> None:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

        def prepare(problem: StepProblem) -> Call:
            of_check = checked(training)
            (first, _), *_ = program(workload, of_check)(range(min(at_once, count)))
            verify_first_loss(first, problem, of_check)

            def run() -> Measurement:
                train = program(workload, training)
                outcome = run_episodes(train, count, workload.queries, at_once, say)
                return {"program": name, "outcome": outcome}

            return run

        return Implementation(name, prepare)

    found = []
    for number in settings.parallel_episodes or _AT_ONCE[device]:
        name = f"{OURS}{training.runtime.backend}" + (f", {number} at once" if number > 1 else "")
        found.append(implementation(name, training, ours, episodes, number))
    for dtype in published_precisions(device, training.runtime.precision):
        as_published = training.running(precision=dtype)
        found.append(implementation(PUBLISHED + dtype, as_published, as_was_published, theirs))
    return found


def ours(workload: Workload, training: Training) -> Train:
    """The engine; its model is loaded once, now."""
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

    return train


def as_was_published(workload: Workload, training: Training) -> Train:
    """The published program, which starts over at each episode."""
    folder = workload.model_folder

    def train(numbers: Sequence[int]) -> Iterator[tuple[float, float]]:
        for number in numbers:
            files = workload.files(number, training.shots)
            losses, accuracy = published.run_episode(folder, files, training)
            yield losses[0], accuracy

    return train


def run_episodes(
    train: Train, episodes: int, queries: int, at_once: int, say: Callable[[str], None]
) -> RunOutcome:
    """A whole run.

    Args:
        train: The program.
        episodes: Their number.
        queries: Query images of each.
        at_once: Most of them that are trained at once.
        say: Is called with a line of progress.
    """
    found: list[tuple[float, float]] = []
    start = time.perf_counter()
    for first in range(0, episodes, at_once):
        found += train(range(first, min(first + at_once, episodes)))
        mean = statistics.fmean(accuracy for _, accuracy in found)
        say(f"{len(found)} of {episodes} episodes, accuracy {mean:.1%}")
    seconds = (time.perf_counter() - start) / episodes
    losses, accuracies = map(list, zip(*found, strict=True))
    return RunOutcome(seconds, losses, accuracies, queries)


def _measure_runs(dtype: str, runs: Sequence[Call], seconds: float) -> list[Measurement]:
    """Each run once: its episodes are the repetitions."""
    found = attempts(runs, seconds)
    finished = [(each["program"], each["outcome"]) for each in found if "outcome" in each]
    theirs = [outcome for program, outcome in finished if program.startswith(PUBLISHED)]

    def measured(program: str, outcome: RunOutcome) -> Measurement:
        compared = theirs if program.startswith(OURS) else []
        for wrong in filter(None, (disagreement(outcome, each, dtype) for each in compared)):
            return {"wrong": wrong}
        return {
            "ms": 1e3 * outcome.seconds,
            "episodes": len(outcome.accuracies),
            "episodes_per_hour": 3600 / outcome.seconds,
            "accuracy": statistics.fmean(outcome.accuracies),
        }

    return [measured(**each) if "outcome" in each else each for each in found]


def disagreement(ours: RunOutcome, theirs: RunOutcome, dtype: str) -> str:
    """The difference of two programs' results beyond rounding and chance; empty if there is none.

    Dropout draws other numbers in each program, so their accuracies over the episodes that both ran
    agree up to chance.
    """
    losses = zip(ours.first_losses, theirs.first_losses, strict=False)
    for index, (one, other) in enumerate(losses):
        if wrong := wrong_first_loss(one, other, dtype):
            return f"episode {index}: {wrong} with the published program"
    both = min(len(ours.accuracies), len(theirs.accuracies))
    one, other = (statistics.fmean(run.accuracies[:both]) for run in (ours, theirs))
    mean = (one + other) / 2
    error = math.sqrt(2 * mean * (1 - mean) / (both * ours.queries))
    if abs(one - other) <= _ALLOWED_ERRORS * error:
        return ""
    return f"accuracy {one:.1%} over {both} episodes, but {other:.1%} with the published program"


def _start_up(workload: Workload, training: Training, settings: Settings) -> Case:
    def start() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return start_up_seconds(workload, training, settings.ways, Path(folder) / "run")

    def prepare(_: Workload) -> Call:
        start()  # files and compiled kernels are in their caches from now on
        repeats = 1 if settings.quick else 3
        return lambda: {"ms": 1e3 * statistics.median(start() for _ in range(repeats))}

    return _case(
        START_UP,
        workload,
        training,
        settings,
        make_inputs=lambda: workload,
        implementations=[Implementation(f"{OURS}{training.runtime.backend}", prepare)],
        measure=attempts,
        priority=FIRST,
    )


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
