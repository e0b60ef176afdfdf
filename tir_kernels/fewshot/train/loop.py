"""Fine-tune a model on few-shot episodes: one, or many of which some are trained at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Method, Observer
from tir_kernels.fewshot.settings import AUTO, Runtime
from tir_kernels.fewshot.train.batch import (
    EpisodeResult,
    Job,
    NonFiniteLossError,
    StepListener,
    cost_of_a_step,
    finetune_batch,
)
from tir_kernels.fewshot.train.memory import available_bytes, with_one_memory_error

Tokenizer = Callable[[list[str]], Tensor]

_USABLE_SHARE = 0.85  # of the memory that is free
_STEP_FACTOR = 1.3  # what a step takes over what its forward pass keeps: gradients under way
_CPU_IMAGES = 64  # trained at once: more than that only overflows the caches
_CPU_EPISODES = 16  # of features alone, whose images are held meanwhile
_DEFAULT_RUNTIME = Runtime()


def finetune_episode(
    model: nn.Module,
    tokenizer: Tokenizer,
    episode: Episode,
    method: Method,
    *,
    seed: int = 0,
    runtime: Runtime = _DEFAULT_RUNTIME,
    on_step: Callable[[int, float], None] | None = None,
    observers: Sequence[Observer] = (),
) -> EpisodeResult:
    """Let a method learn from the support images of an episode, and classify its query images.

    The same as :func:`finetune_episodes` of this one.

    Args:
        model: An open_clip model on ``runtime.device``. It is frozen meanwhile and left as it was,
            also when training fails or is interrupted.
        tokenizer: Its tokenizer: list of strings -> (C, T) token ids.
        episode: Class names, images and labels.
        method: Method with its options, such as ``methods.TIR(steps=50)``.
        seed: Seed of the run; an episode's random numbers depend on it and ``episode.index``.
        runtime: Device and types.
        on_step: Called with the step, from 0, and its loss after each step.
        observers: Listeners between steps.

    Returns:
        The losses, the logits of the query images and what was trained.

    Raises:
        ValueError, TypeError: Unsuitable images, labels, names or model.
        NonFiniteLossError: The loss became NaN or infinite.
        torch.OutOfMemoryError: Memory does not suffice, on a CPU too.
    """

    def note_step(position: int, step: int, loss: float) -> None:
        if on_step is not None:
            on_step(step, loss)

    (result,) = finetune_episodes(
        model,
        tokenizer,
        [episode],
        method,
        seed=seed,
        runtime=runtime,
        on_step=None if on_step is None else note_step,
        observers=observers,
    )
    if isinstance(result, NonFiniteLossError):
        raise result
    return result


def finetune_episodes(
    model: nn.Module,
    tokenizer: Tokenizer,
    episodes: Sequence[Episode],
    method: Method,
    *,
    seed: int = 0,
    runtime: Runtime = _DEFAULT_RUNTIME,
    on_step: StepListener | None = None,
    observers: Sequence[Observer] = (),
) -> list[EpisodeResult | NonFiniteLossError]:
    """Let a method learn from each of several episodes, many of them at once.

    Each result is what the episode gives alone, up to rounding: what the others are plays no part.
    Where memory runs out, half as many are trained at once, with a warning.

    Args:
        model, tokenizer, method, seed, observers: As for :func:`finetune_episode`.
        episodes: Their classes and images. Those of equal numbers of classes and support images
            are trained together, at most ``runtime.parallel`` at once.
        runtime: Device and types, and how many at once.
        on_step: Called with the episode's position, the step from 0, and its loss.

    Returns:
        One entry an episode, in their order: its result, or the error where its loss became NaN or
        infinite, which does not touch the others.

    Raises:
        ValueError, TypeError: Unsuitable images, labels, names, model or ``runtime.parallel``.
        torch.OutOfMemoryError: Memory does not suffice for a single episode.
    """
    return finetune(Job(model, tokenizer, method, seed, runtime, observers), episodes, on_step)


def finetune(
    job: Job, episodes: Sequence[Episode], on_step: StepListener | None = None
) -> list[EpisodeResult | NonFiniteLossError]:
    """As :func:`finetune_episodes`, for what a job says."""
    alike: dict[tuple, list[int]] = {}
    for position, episode in enumerate(episodes):
        episode.check()
        images = (episode.support_images.shape, episode.query_images.shape[1:])
        key = (len(episode.class_names), episode.images_per_class, episode.views, *images)
        alike.setdefault(key, []).append(position)
    results: dict[int, EpisodeResult | NonFiniteLossError] = {}

    def run(positions: list[int]) -> None:
        def note_step(index: int, step: int, loss: float) -> None:
            if on_step is not None:
                on_step(positions[index], step, loss)

        chosen = [episodes[position] for position in positions]
        try:
            with with_one_memory_error():
                found = finetune_batch(job, chosen, None if on_step is None else note_step)
        except torch.OutOfMemoryError:
            if len(positions) == 1:
                raise
            found = None  # and on outside of the handler, whose traceback holds the memory
        if found is not None:
            results.update(zip(positions, found, strict=True))
            return
        half = (len(positions) + 1) // 2
        warnings.warn(
            f"{len(positions)} episodes at once do not fit into the memory of {job.device}; "
            f"going on with {half}",
            stacklevel=4,
        )
        run(positions[:half])
        run(positions[half:])

    for positions in alike.values():
        size = _at_once(job, episodes[positions[0]], len(positions))
        for first in range(0, len(positions), size):
            run(positions[first : first + size])
    return [results[position] for position in range(len(episodes))]


def require_parts(
    model: nn.Module,
    tokenizer: Tokenizer,
    method: Method,
    class_names: Sequence[str],
    shots: int,
    runtime: Runtime = _DEFAULT_RUNTIME,
) -> None:
    """Check that a model has what a method is built on, by building its learner and no more.

    Args:
        model, tokenizer, method, runtime: As for :func:`finetune_episode`.
        class_names: The words of an episode's classes.
        shots: Labelled images of each.

    Raises:
        ValueError, TypeError: It has not: no such layer, say, no text tower, or no room in it.
    """
    labels = torch.empty(0, dtype=torch.int64, device="cpu")
    images = torch.empty(0, 3, 1, 1, device="cpu")
    episode = Episode(list(class_names), images, labels, images, shots=shots, views_per_image=1)
    # In float32, so that no weight is copied to another type.
    job = Job(model, tokenizer, method, 0, replace(runtime, precision="float32"))
    with with_one_memory_error(), job.learner([episode]):
        pass


def require_parallel(runtime: Runtime, methods: Sequence[Method]) -> None:
    """Check that so many episodes may be trained at once.

    Raises:
        ValueError: In float16 a gradient that overflows makes a training skip that step and lower
            its loss scale, which would touch the others.
    """
    number = runtime.parallel
    is_shared = isinstance(number, int) and number > 1
    if is_shared and runtime.precision == "float16" and any(method.steps for method in methods):
        raise ValueError(
            f"parallel must be 1 with precision='float16', whose loss scale episodes can't share; "
            f"got {number}: use precision='bfloat16' to train several at once"
        )


def _at_once(job: Job, episode: Episode, count: int) -> int:
    """How many of ``count`` episodes like this one are trained at once."""
    require_parallel(job.runtime, [job.method])
    if job.runtime.precision == "float16" and job.method.steps:
        return 1
    parallel = job.runtime.parallel
    if parallel is None:
        return count
    if isinstance(parallel, int):
        return parallel
    return 1 if count == 1 else _fitting(job, episode)


def episodes_that_fit(
    model: nn.Module,
    tokenizer: Tokenizer,
    episode: Episode,
    method: Method,
    runtime: Runtime = _DEFAULT_RUNTIME,
) -> int:
    """The number of episodes like this one that can be trained at once in the memory that is free.

    One forward pass shows what a step keeps for its gradients. On a CPU more than a few images at
    once gain nothing, so that there the number is small in any case.

    Args:
        model, tokenizer, episode, method, runtime: As for :func:`finetune_episode`.

    Returns:
        At least 1; in float16 1, since the loss scale can't be shared; 1 for a method without
        steps.

    Raises:
        torch.OutOfMemoryError: Memory does not suffice for this one.
    """
    episode.check()
    job = Job(model, tokenizer, method, 0, replace(runtime, parallel=AUTO))
    return _at_once(job, episode, count=2)


def _fitting(job: Job, episode: Episode) -> int:
    if not job.method.steps:
        return 1
    with with_one_memory_error():
        step = cost_of_a_step(job, [episode])
    needed = _STEP_FACTOR * step.kept_bytes
    if not step.runs_image_tower:
        held = (episode.support_images, episode.query_images)
        needed += sum(images.nbytes for images in held if isinstance(images, Tensor))
    fitting = int(_USABLE_SHARE * available_bytes(job.device) / needed)
    if job.device.type == "cpu":
        images = len(episode.support_images)
        most = _CPU_IMAGES // images if step.runs_image_tower else _CPU_EPISODES
        fitting = min(fitting, most)
    return max(1, fitting)
