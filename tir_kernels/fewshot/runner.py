"""The loop over episodes and methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from tir_kernels.fewshot.config import FewShotConfig
from tir_kernels.fewshot.data import ImageFolderData, ImageReader
from tir_kernels.fewshot.episodes import Episode, load_episode, plan_episode
from tir_kernels.fewshot.errors import FewShotError, first_line
from tir_kernels.fewshot.journal import OK, Journal, Record
from tir_kernels.fewshot.models import LoadedModel

NON_FINITE_LOSS = "non-finite loss"
NON_FINITE_LOGITS = "non-finite logits"

FinetuneFunction = Callable[..., Any]


class StepListener(Protocol):
    """Is told of each training step, for a progress display."""

    def __call__(self, episode: int, method: str, step: int, loss: float) -> None: ...


@dataclass(frozen=True)
class RunPlan:
    """What a run does.

    Args:
        ways: Classes per episode.
        queries: Query images per class.
        episodes: Number of episodes.
        methods: Methods, each of which sees every episode.
        config: All other settings; its ``method`` is not used, and its ``seed`` is the run's.
        parallel: Most episodes that are trained at once; the numbers do not depend on it.
    """

    ways: int
    queries: int
    episodes: int
    methods: tuple[str, ...]
    config: FewShotConfig
    parallel: int = 1

    def settings(self, data: ImageFolderData, model: LoadedModel) -> dict[str, Any]:
        """All that decides an episode's numbers, as JSON values, by the names of the options."""
        return asdict(self.config) | {
            "data": f"content {data.fingerprint[:16]}",
            "model": f"content {model.fingerprint[:16]}",
            "ways": self.ways,
            "queries": self.queries,
            "method": list(self.methods),
        }


def run_episodes(
    plan: RunPlan,
    data: ImageFolderData,
    images: ImageReader,
    model: LoadedModel,
    journal: Journal,
    *,
    finetune: FinetuneFunction | None = None,
    on_step: StepListener | None = None,
) -> Iterator[Record]:
    """Run what the journal does not have yet, and yield each record once it is on the disk.

    An episode and its training depend on (seed, episode number) only, so a run that is stopped and
    continued gives the same records as one that is not.

    Args:
        plan: What to do.
        data: Classes and images.
        images: Reads the images.
        model: The model.
        journal: Where records go.
        finetune: Stands in for ``finetune_episodes``.
        on_step: Is called after each training step.

    Raises:
        FewShotError: An image can't be read, a setting does not fit the model, memory runs out, or
            the journal can't be written.
    """
    if finetune is None:
        from tir_kernels.fewshot.engine import finetune_episodes

        finetune = finetune_episodes
    sizes = [len(entry.files) for entry in data.classes]
    missing = [
        index
        for index in range(plan.episodes)
        if any((index, method) not in journal for method in plan.methods)
    ]
    for first in range(0, len(missing), plan.parallel):
        episodes = [
            load_episode(
                plan_episode(plan.config.seed, index, sizes, plan.ways),
                data,
                images,
                shots=plan.config.shots,
                queries=plan.queries,
            )
            for index in missing[first : first + plan.parallel]
        ]
        for method in plan.methods:
            chosen = [each for each in episodes if (each.index, method) not in journal]
            if not chosen:
                continue
            config = replace(plan.config, method=method)
            for record in _run_together(chosen, config, model, finetune, on_step):
                journal.append(record)
                yield record


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
    try:
        results = finetune(model.model, model.tokenizer, episodes, config, on_step=note_step)
    except torch.OutOfMemoryError as error:
        raise FewShotError(
            f"{where}: out of memory on {config.device}; lower --queries, --shots or --ways, or "
            "use --precision bfloat16; what is finished is kept"
        ) from error
    except (ValueError, TypeError) as error:
        # The engine's own checks: a layer the model does not have, a class name that is too long.
        raise FewShotError(f"{where}: {first_line(error)}") from error
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
    """What one episode came to; ``result`` is an ``EpisodeResult`` or a ``NonFiniteLossError``."""
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
