"""The loop over episodes and methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from tir_kernels.fewshot.config import FewShotConfig
from tir_kernels.fewshot.data import ImageFolderData, ImageReader
from tir_kernels.fewshot.episodes import Episode, episode_seed, load_episode, plan_episode
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
    """

    ways: int
    queries: int
    episodes: int
    methods: tuple[str, ...]
    config: FewShotConfig

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
        finetune: Stands in for ``finetune_episode``.
        on_step: Is called after each training step.

    Raises:
        FewShotError: An image can't be read, a setting does not fit the model, memory runs out, or
            the journal can't be written.
    """
    if finetune is None:
        from tir_kernels.fewshot.engine import finetune_episode

        finetune = finetune_episode
    sizes = [len(entry.files) for entry in data.classes]
    for index in range(plan.episodes):
        missing = [method for method in plan.methods if (index, method) not in journal]
        if not missing:
            continue
        drawn = plan_episode(plan.config.seed, index, sizes, plan.ways)
        episode = load_episode(drawn, data, images, shots=plan.config.shots, queries=plan.queries)
        for method in missing:
            config = replace(plan.config, method=method, seed=episode_seed(plan.config.seed, index))
            record = _run_one(episode, config, model, finetune, on_step)
            journal.append(record)
            yield record


def _run_one(
    episode: Episode,
    config: FewShotConfig,
    model: LoadedModel,
    finetune: FinetuneFunction,
    on_step: StepListener | None,
) -> Record:
    from tir_kernels.fewshot.engine import NonFiniteLossError

    where = f"episode {episode.index}, {config.method}"
    stamps: list[float] = []

    def note_step(step: int, loss: float) -> None:
        stamps.append(time.perf_counter())
        if on_step is not None:
            on_step(episode.index, config.method, step, loss)

    start = time.perf_counter()
    result, status = None, OK
    try:
        result = finetune(
            model.model,
            model.tokenizer,
            episode.class_names,
            episode.support_images,
            episode.support_labels,
            episode.query_images,
            config,
            on_step=note_step,
        )
    except NonFiniteLossError:
        status = NON_FINITE_LOSS
    except torch.OutOfMemoryError as error:
        raise FewShotError(
            f"{where}: out of memory on {config.device}; lower --queries, --shots or --ways, or "
            "use --precision bfloat16; what is finished is kept"
        ) from error
    except (ValueError, TypeError) as error:
        # The engine's own checks: a layer the model does not have, a class name that is too long.
        raise FewShotError(f"{where}: {first_line(error)}") from error
    seconds = time.perf_counter() - start
    if result is not None and not bool(torch.isfinite(result.query_logits).all()):
        result, status = None, NON_FINITE_LOGITS
    total = len(episode.query_labels)
    correct = None
    if result is not None:
        correct = int((result.query_logits.argmax(dim=1).cpu() == episode.query_labels).sum())
    return Record(
        episode=episode.index,
        method=config.method,
        classes=episode.folders,
        correct=correct,
        total=total,
        accuracy=None if correct is None else correct / total,
        final_loss=float(result.losses[-1]) if result is not None and result.losses else None,
        seconds=round(seconds, 6),
        status=status,
        seconds_per_step=_seconds_per_step(start, stamps),
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
