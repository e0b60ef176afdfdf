"""The loop over episodes and methods, of one process or of several that share a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import Episode, plan_episode
from tir_kernels.fewshot.run.folder import RunFolder
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.records import OK, Record
from tir_kernels.fewshot.settings import FewShotConfig
from tir_kernels.fewshot.train.memory import with_one_memory_error
from tir_kernels.text import setting
from tir_kernels.towers.loading.models import LoadedModel

NON_FINITE_LOSS = "non-finite loss"
NON_FINITE_LOGITS = "non-finite logits"

# Between two looks at what the other processes have finished, for one that has nothing to do.
_LOOK_SECONDS = 0.5

FinetuneFunction = Callable[..., Any]


class StepListener(Protocol):
    """A listener that is told of each training step, for a progress display."""

    def __call__(self, episode: int, method: str, step: int, loss: float) -> None: ...


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    Args:
        ways: Classes per episode.
        queries: Query images per class.
        episodes: Number of episodes.
        methods: Methods, each of which sees every episode.
        config: All other settings; its ``method`` is not used, and its ``seed`` is the run's.
        parallel: Most episodes that are trained at once, or "auto" for what fits into memory; the
            numbers do not depend on it, up to rounding.
        augment: Augmented views of each support image.
        checkpoint: Compute activations again in the backward pass instead of keeping them.
    """

    ways: int
    queries: int
    episodes: int
    methods: tuple[str, ...]
    config: FewShotConfig
    parallel: int | Literal["auto"] = 1
    augment: int = 0
    checkpoint: bool = False

    def settings(self, data: ImageData, model: LoadedModel) -> dict[str, Any]:
        """All that decides an episode's numbers, as JSON values, by the names of the options."""
        # Runs from before there was augmentation have none, and no word on it.
        augment = {"augment": self.augment} if self.augment else {}
        return asdict(self.config) | {
            "data": f"content {data.fingerprint[:16]}",
            "model": f"content {model.fingerprint[:16]}",
            "ways": self.ways,
            "queries": self.queries,
            "method": list(self.methods),
            **augment,
        }


def run_episodes(
    plan: RunPlan,
    data: ImageData,
    images: ImageReader,
    model: LoadedModel,
    folder: RunFolder,
    journal: Journal,
    *,
    finetune: FinetuneFunction | None = None,
    on_step: StepListener | None = None,
) -> Iterator[Record]:
    """Run what the journal does not have yet, and yield each record once it is on the disk.

    Processes that share the run take episodes as they become free, and each returns when all are
    finished: whoever has nothing left to take waits for the others, shows what they finish, and
    runs what one of them leaves behind. An episode and its training depend on (seed, episode
    number) only, so the records do not depend on who ran them, nor on interruptions.

    Args:
        plan: What to do.
        data: Classes and images.
        images: Reads the images.
        model: The model.
        folder: Hands out the episodes.
        journal: Where records go.
        finetune: Stands in for ``finetune_episodes``.
        on_step: Is called after each training step.

    Yields:
        The records of all processes, but not those the journal had at the beginning.

    Raises:
        FewShotError: An image can't be read, a setting does not fit the model, memory runs out, or
            the journal can't be read or written.
    """
    if finetune is None:
        from tir_kernels.fewshot.train.loop import finetune_episodes

        finetune = partial(finetune_episodes, checkpoint=plan.checkpoint)
    sizes = [len(entry.files) for entry in data.classes]

    def load(index: int) -> Episode:
        with _explained(f"episode {index}", plan.config):
            return load_episode(
                plan_episode(plan.config.seed, index, sizes, plan.ways),
                data,
                images,
                shots=plan.config.shots,
                queries=plan.queries,
                device=plan.config.device,
                augment=plan.augment,
                seed=plan.config.seed,
            )

    unfinished = _unfinished(plan, journal)
    if not unfinished:
        return
    parallel = plan.parallel
    if parallel == "auto":
        parallel = _fitting(load(unfinished[0]), plan, model)
    at_most = _piece_size(len(unfinished), parallel, folder.place.count)
    while unfinished := _unfinished(plan, journal):
        with folder.episodes(unfinished, at_most) as held:
            # Others may have finished some of them since the journal was last read.
            yield from journal.news()
            episodes = [load(index) for index in held if _is_unfinished(plan, journal, index)]
            for method in plan.methods:
                chosen = [each for each in episodes if (each.index, method) not in journal]
                if not chosen:
                    continue
                config = replace(plan.config, method=method)
                for record in _run_together(chosen, config, model, finetune, on_step):
                    journal.append(record)
                    yield from journal.news()
        if not held:
            time.sleep(_LOOK_SECONDS)


def require_distinct_prompts(data: ImageData, tokenizer: Callable[[list[str]], Tensor]) -> None:
    """Check that a model's tokenizer tells the words of all classes apart.

    Raises:
        FewShotError: Two classes have the same tokens, as words have that differ in case only, or
            in characters that the tokenizer leaves out.
    """
    owners: dict[tuple[int, ...], ImageClass] = {}
    for entry, tokens in zip(data.classes, tokenizer([c.words for c in data.classes]), strict=True):
        other = owners.setdefault(tuple(tokens.tolist()), entry)
        if other is not entry:
            raise FewShotError(
                f"classes {other.folder!r} and {entry.folder!r} have the words {other.words!r} and "
                f"{entry.words!r}, which the model's tokenizer does not tell apart; give them "
                f"others with {setting('class_names', 'FILE')}"
            )


def _is_unfinished(plan: RunPlan, journal: Journal, index: int) -> bool:
    return any((index, method) not in journal for method in plan.methods)


def _unfinished(plan: RunPlan, journal: Journal) -> list[int]:
    return [index for index in range(plan.episodes) if _is_unfinished(plan, journal, index)]


def _fitting(episode: Episode, plan: RunPlan, model: LoadedModel) -> int:
    """Episodes like this one that can be trained at once, whatever the method."""
    from tir_kernels.fewshot.train.loop import episodes_that_fit

    trained = [method for method in plan.methods if method != "zero-shot"]
    with _explained(f"episode {episode.index}", plan.config):
        fitting = [
            episodes_that_fit(
                model.model,
                model.tokenizer,
                episode,
                replace(plan.config, method=method),
                checkpoint=plan.checkpoint,
            )
            for method in trained
        ]
    return min(fitting, default=1)


@contextmanager
def _explained(where: str, config: FewShotConfig) -> Iterator[None]:
    try:
        with with_one_memory_error():
            yield
    except torch.OutOfMemoryError as error:
        raise FewShotError(
            f"{where}: out of memory on {config.device}; lower {setting('queries')}, "
            f"{setting('shots')} or {setting('ways')}, or "
            f"use {setting('checkpoint')} or {setting('precision', 'bfloat16')}; what is "
            "finished is kept"
        ) from error
    except (ValueError, TypeError) as error:
        # The engine's own checks: a layer the model does not have, a class name that is too long.
        raise FewShotError(f"{where}: {first_line(error)}") from error


def _piece_size(episodes: int, parallel: int, processes: int) -> int:
    """Episodes to take at once: as many as may be, but so that all processes end together."""
    rounds = math.ceil(episodes / (parallel * processes))
    return math.ceil(episodes / (rounds * processes)) if rounds else 1


def _run_together(
    episodes: list[Episode],
    config: FewShotConfig,
    model: LoadedModel,
    finetune: FinetuneFunction,
    on_step: StepListener | None,
) -> list[Record]:
    numbers = ", ".join(str(episode.index) for episode in episodes)
    where = f"episode{'s' if len(episodes) > 1 else ''} {numbers}, {config.method}"
    stamps: list[float] = []  # of the first episode's steps

    def note_step(position: int, step: int, loss: float) -> None:
        if position == 0:
            stamps.append(time.perf_counter())
        if on_step is not None:
            on_step(episodes[position].index, config.method, step, loss)

    start = time.perf_counter()
    with _explained(where, config):
        results = finetune(model.model, model.tokenizer, episodes, config, on_step=note_step)
    seconds = (time.perf_counter() - start) / len(episodes)
    per_step = _seconds_per_step(start, stamps)
    if per_step is not None:
        per_step = round(per_step / len(episodes), 6)
    return [
        _record(episode, config.method, result, seconds, per_step)
        for episode, result in zip(episodes, results, strict=True)
    ]


def _record(
    episode: Episode, method: str, result: Any, seconds: float, seconds_per_step: float | None
) -> Record:
    """The record of an episode; ``result`` is an ``EpisodeResult`` or a ``NonFiniteLossError``."""
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
        method=method,
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
