"""The loop over episodes and arms, of one process or of several that share a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot import settings
from tir_kernels.fewshot.data.dataset import ImageData
from tir_kernels.fewshot.data.draw import draw_episode
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Observer
from tir_kernels.fewshot.run.folder import RunFolder
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.records import OK, Record
from tir_kernels.fewshot.settings import Arm
from tir_kernels.fewshot.train.memory import engine_errors_explained
from tir_kernels.text import setting

if TYPE_CHECKING:
    from tir_kernels.fewshot.trainer import Trainer

NON_FINITE_LOSS = "non-finite loss"
NON_FINITE_LOGITS = "non-finite logits"

# Between two looks at what the other processes have finished, for one that has nothing to do.
_LOOK_SECONDS = 0.5


class StepListener(Protocol):
    """A listener that is told of each training step, for a progress display."""

    def __call__(self, episode: int, arm: str, step: int, loss: float) -> None: ...


class Watcher(Protocol):
    """Looks at trainings, and keeps what it saw beside the journal."""

    def observers(self, arm: Arm, episodes: Sequence[Episode]) -> Sequence[Observer]:
        """Observers of the next training."""

    def keep(self, record: Record) -> None:
        """Have what was seen of a finished training on the disk, before its record is there."""


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Args:
        protocol: Sizes and seed of the episodes.
        episodes: Number of episodes.
        arms: Arms, each of which sees every episode.
        device: Device on which images are normalised and augmented.
        parallel: Most episodes that are trained at once, or "auto" for what fits into memory; the
            numbers do not depend on it, up to rounding.
    """

    protocol: settings.Protocol
    episodes: int
    arms: tuple[Arm, ...]
    device: str = "cpu"
    parallel: int | str = 1


def run_episodes(
    plan: RunPlan,
    data: ImageData,
    images: ImageReader,
    trainer: Trainer,
    folder: RunFolder,
    journal: Journal,
    *,
    on_step: StepListener | None = None,
    watcher: Watcher | None = None,
) -> Iterator[Record]:
    """Run what the journal does not have yet, and yield each record once it is on the disk.

    Processes that share the run take episodes as they become free, and each returns when all are
    finished: whoever has nothing left to take waits for the others, shows what they finish, and
    runs what one of them leaves behind. An episode and its training depend on (seed, episode
    number) only, so the records do not depend on who ran them, nor on interruptions.

    Args:
        plan: The plan.
        data: Classes and images.
        images: Reader of the images.
        trainer: Model and the way in which it is trained.
        folder: Folder of the run, which hands out the episodes.
        journal: Journal of this process.
        on_step: Function called after each training step.
        watcher: Watches the trainings.

    Yields:
        The records of all processes, but not those the journal had at the beginning.

    Raises:
        FewShotError: An image can't be read, a setting does not fit the model, memory runs out, or
            the journal can't be read or written.
    """
    protocol = plan.protocol

    def load(index: int) -> Episode:
        with _explained(f"episode {index}", plan.device):
            return load_episode(
                draw_episode(data, protocol, index),
                data,
                images,
                shots=protocol.shots,
                queries=protocol.queries_per_class,
                device=plan.device,
                augment=protocol.augment,
                seed=protocol.seed,
            )

    unfinished = _unfinished(plan, journal)
    if not unfinished:
        return
    at_once = _episodes_at_once(plan, unfinished, folder.place.count, load, trainer)
    while unfinished := _unfinished(plan, journal):
        with folder.episodes(unfinished, at_once) as held:
            # Others may have finished some of them since the journal was last read.
            yield from journal.news()
            episodes = [load(index) for index in held if _is_unfinished(plan, journal, index)]
            for arm in plan.arms:
                chosen = [each for each in episodes if (each.index, arm.name) not in journal]
                if not chosen:
                    continue
                observers = () if watcher is None else watcher.observers(arm, chosen)
                for record in _run_together(chosen, arm, plan.device, trainer, on_step, observers):
                    if watcher is not None:
                        watcher.keep(record)
                    journal.append(record)
                    yield from journal.news()
        if not held:
            time.sleep(_LOOK_SECONDS)


def _episodes_at_once(
    plan: RunPlan,
    unfinished: Sequence[int],
    processes: int,
    load: Callable[[int], Episode],
    trainer: Trainer,
) -> int:
    """The number of episodes that a process takes and trains at once.

    They are as many as the plan allows, whatever the arm, but so that all processes end together.
    """
    if not isinstance(plan.parallel, int):
        episode = load(unfinished[0])
        with _explained(f"episode {episode.index}", plan.device):
            fitting = [trainer.fitting(episode, arm.method) for arm in plan.arms]
        most = min((number for number in fitting if number is not None), default=1)
    else:
        most = plan.parallel
    rounds = math.ceil(len(unfinished) / (most * processes))
    return math.ceil(len(unfinished) / (rounds * processes))


def _is_unfinished(plan: RunPlan, journal: Journal, index: int) -> bool:
    return any((index, arm.name) not in journal for arm in plan.arms)


def _unfinished(plan: RunPlan, journal: Journal) -> list[int]:
    return [index for index in range(plan.episodes) if _is_unfinished(plan, journal, index)]


@contextmanager
def _explained(where: str, device: str) -> Iterator[None]:
    try:
        with engine_errors_explained(f"{where}: "):
            yield
    except torch.OutOfMemoryError as error:
        raise FewShotError(
            f"{where}: out of memory on {device}; lower {setting('queries')}, "
            f"{setting('shots')} or {setting('ways')}, or "
            f"use {setting('checkpoint')} or {setting('precision', 'bfloat16')}; what is "
            "finished is kept"
        ) from error


def _run_together(
    episodes: list[Episode],
    arm: Arm,
    device: str,
    trainer: Trainer,
    on_step: StepListener | None,
    observers: Sequence[Observer],
) -> list[Record]:
    numbers = ", ".join(str(episode.index) for episode in episodes)
    where = f"episode{'s' if len(episodes) > 1 else ''} {numbers}, {arm.name}"
    stamps: list[float] = []  # of the first episode's steps

    def note_step(position: int, step: int, loss: float) -> None:
        if position == 0:
            stamps.append(time.perf_counter())
        if on_step is not None:
            on_step(episodes[position].index, arm.name, step, loss)

    start = time.perf_counter()
    with _explained(where, device):
        results = trainer.train(episodes, arm.method, note_step, observers)
    seconds = (time.perf_counter() - start) / len(episodes)
    per_step = _seconds_per_step(start, stamps)
    if per_step is not None:
        per_step = round(per_step / len(episodes), 6)
    return [
        _record(episode, arm.name, result, seconds, per_step)
        for episode, result in zip(episodes, results, strict=True)
    ]


def _record(
    episode: Episode, arm: str, result: Any, seconds: float, seconds_per_step: float | None
) -> Record:
    """The record of an episode; ``result`` is as ``Trainer.train`` gives it."""
    status = OK
    if isinstance(result, Exception):
        result, status = None, NON_FINITE_LOSS
    elif not bool(torch.isfinite(result.query_logits).all()):
        result, status = None, NON_FINITE_LOGITS
    total = len(episode.query_labels)
    correct = None
    if result is not None:
        correct = int((result.query_logits.argmax(dim=1).cpu() == episode.query_labels).sum())
    return Record(
        episode=episode.index,
        arm=arm,
        classes=episode.folders,
        correct=correct,
        total=total,
        accuracy=None if correct is None else correct / total,
        final_loss=float(result.losses[-1]) if result is not None and result.losses else None,
        seconds=round(seconds, 6),
        status=status,
        seconds_per_step=seconds_per_step,
        support_accuracy=None if result is None else float(result.support_accuracy),
        skipped=episode.skipped,
    )


def _seconds_per_step(start: float, stamps: list[float]) -> float | None:
    # From the first step to the last: what comes before and after them is not training.
    if not stamps:
        return None
    if len(stamps) == 1:
        return round(stamps[0] - start, 6)
    return round((stamps[-1] - stamps[0]) / (len(stamps) - 1), 6)
