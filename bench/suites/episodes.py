"""Whole runs of few-shot episodes beside the method's published program, and the start-up time."""

from __future__ import annotations

import functools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import whole_runs
from bench.cases import Case, Implementation
from bench.counting import episode_cost
from bench.settings import OURS, PUBLISHED, START_UP, WHOLE_RUN, Settings
from bench.timing import Call, Measurement
from bench.training import Training
from bench.whole_runs import RunOutcome
from bench.workload import Workload
from tir_kernels.fewshot import Runtime
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

# (settings, number of episodes, where lines of progress go)
RunEpisodes = Callable[[Training, int, Callable[[str], None]], RunOutcome]


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

    def ours(at_once: int) -> RunEpisodes:
        return lambda training, count, say: whole_runs.run_ours(
            workload, training, count, at_once, say
        )

    found = []
    for number in settings.parallel_episodes or _AT_ONCE[device]:
        name = f"{OURS}{training.runtime.backend}" + (f", {number} at once" if number > 1 else "")
        found.append(_implementation(name, training, ours(number), episodes, min(number, episodes)))
    run = functools.partial(whole_runs.run_published, workload)
    for dtype in published_precisions(device, training.runtime.precision):
        as_published = training.running(precision=dtype)
        found.append(_implementation(PUBLISHED + dtype, as_published, run, theirs, 1))
    return found


def _implementation(
    name: str, training: Training, run: RunEpisodes, episodes: int, warm_up: int
) -> Implementation:
    def say(line: str) -> None:
        print(f"{name}: {line}", file=sys.stderr, flush=True)

    def prepare(problem: StepProblem) -> Call:
        training_of_check = checked(training)
        first = run(training_of_check, warm_up, lambda line: None)
        verify_first_loss(first.first_losses[0], problem, training_of_check)
        return lambda: (name, run(training, episodes, say))

    return Implementation(name, prepare)


def _measure_runs(dtype: str, runs: Sequence[Callable], seconds: float) -> list[Measurement]:
    """Each run once: its episodes are the repetitions."""
    found: list[tuple[str, RunOutcome] | str] = [_attempt(run) for run in runs]
    finished = [each for each in found if not isinstance(each, str)]
    theirs = [outcome for name, outcome in finished if name.startswith(PUBLISHED)]

    def measured(name: str, outcome: RunOutcome) -> Measurement:
        compared = theirs if name.startswith(OURS) else []
        for wrong in filter(None, (disagreement(outcome, each, dtype) for each in compared)):
            return {"wrong": wrong}
        return {
            "ms": 1e3 * outcome.seconds,
            "episodes": len(outcome.accuracies),
            "episodes_per_hour": 3600 / outcome.seconds,
            "accuracy": statistics.fmean(outcome.accuracies),
        }

    return [{"skipped": each} if isinstance(each, str) else measured(*each) for each in found]


def _attempt(run: Callable[[], Any]) -> Any:
    """The result of a call, or why it failed: a non-finite loss, no memory, no first step."""
    try:
        return run()
    except RuntimeError as error:
        return str(error)


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
            out = Path(folder) / "run"
            return whole_runs.start_up_seconds(workload, training, settings.ways, out)

    def prepare(_: Workload) -> Call:
        start()  # files and compiled kernels are in their caches from now on
        return lambda: statistics.median(start() for _ in range(1 if settings.quick else 3))

    def measure(starts: Sequence[Callable[[], float]], seconds: float) -> list[Measurement]:
        found = [_attempt(start) for start in starts]
        return [{"skipped": t} if isinstance(t, str) else {"ms": 1e3 * t} for t in found]

    return _case(
        START_UP,
        workload,
        training,
        settings,
        make_inputs=lambda: workload,
        implementations=[Implementation(f"{OURS}{training.runtime.backend}", prepare)],
        measure=measure,
        priority=FIRST,
    )
