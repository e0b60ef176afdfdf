"""Fine-tune a CLIP model on few-shot episodes: one, or many of which some are trained at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tir_kernels import towers
from tir_kernels.fewshot.episode import Episode, episode_seed
from tir_kernels.fewshot.settings import FewShotConfig
from tir_kernels.fewshot.train.batch import EpisodeBatch, Savings
from tir_kernels.fewshot.train.memory import available_bytes, with_one_memory_error
from tir_kernels.scalars import whole_number

_ALL_SAVINGS = Savings()
_USABLE_SHARE = 0.85  # of the memory that is free
_STEP_FACTOR = 1.3  # what a step takes over what its forward pass keeps: gradients under way
_CPU_IMAGES = 64  # trained at once: more than that only overflows the caches


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
        step: The step, counted from 0, whose loss it was.
        losses: The losses of all steps up to and with that one.
    """

    def __init__(self, step: int, losses: list[float]) -> None:
        super().__init__(
            f"the loss became {losses[-1]} at step {step + 1}: lower lora_lr or context_lr, or use "
            "precision='float32'"
        )
        self.step = step
        self.losses = losses


@dataclass(frozen=True)
class EpisodeResult:
    """The result of fine-tuning on an episode; all tensors are float32 on the CPU.

    Attributes:
        losses: One per step, each before that step's update; empty for "zero-shot".
        query_logits: (Q, C) ``logit_scale`` times cosine, in evaluation mode.
        support_accuracy: Share of the support images classified rightly at the end, in [0, 1].
        context: (context_tokens, W) trained prompt context; ``None`` for "zero-shot".
        lora: ``"{visual|text}.{layer}.{q|k|v}"`` -> A (rank, width), B (width, rank).
    """

    losses: list[float]
    query_logits: Tensor
    support_accuracy: float
    context: Tensor | None = None
    lora: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def finetune_episode(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    support_images: Tensor,
    support_labels: Tensor,
    query_images: Tensor,
    config: FewShotConfig,
    *,
    lora_init: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    savings: Savings = _ALL_SAVINGS,
    checkpoint: bool = False,
) -> EpisodeResult:
    """Train LoRA and a prompt context on the support images, then classify the query images.

    The protocol is that of few-shot fine-tuning with dynamic token re-weighting (arXiv
    2605.25799): full-batch steps of cross entropy over ``logit_scale`` times cosine, AdamW for LoRA
    on query, key and value of both towers, SGD for the context. With method "tir", the class
    embeddings of text block ``text_layer`` decide which patch tokens are turned up or down.

    Args:
        model: An open_clip model on ``config.device``. It is frozen meanwhile and left as it was,
            also when training fails or is interrupted.
        tokenizer: Its tokenizer: list of strings -> (C, T) token ids.
        class_names: C names, in words.
        support_images: (S, 3, H, W) float32, normalised for the model.
        support_labels: (S,) integers in 0..C - 1.
        query_images: (Q, 3, H, W); Q may be 0.
        config: Settings.
        lora_init: ``"{visual|text}.{layer}.{q|k|v}"`` -> A (rank, width) to start from.
        on_step: Called with the step, from 0, and its loss after each step.
        savings: Work that is left out; the results are the same.
        checkpoint: Compute activations again in the backward pass instead of keeping them.

    Returns:
        The losses, the logits of the query images and what was trained.

    Raises:
        ValueError, TypeError: Unsuitable images, labels, names or model.
        NonFiniteLossError: The loss became NaN or infinite.
        torch.OutOfMemoryError: Memory does not suffice, on a CPU too.
    """
    episode = Episode(list(class_names), support_images, support_labels, query_images, index=0)
    _check_episode(episode)

    def note_step(index: int, step: int, loss: float) -> None:
        if on_step is not None:
            on_step(step, loss)

    with with_one_memory_error():
        (result,) = _finetune_batch(
            model,
            tokenizer,
            [episode],
            [config.seed],
            config,
            lora_init,
            None if on_step is None else note_step,
            savings,
            checkpoint,
        )
    if isinstance(result, NonFiniteLossError):
        raise result
    return result


def finetune_episodes(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    episodes: Sequence[Episode],
    config: FewShotConfig,
    *,
    parallel: int | str | None = None,
    lora_init: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    savings: Savings = _ALL_SAVINGS,
    checkpoint: bool = False,
) -> list[EpisodeResult | NonFiniteLossError]:
    """Fine-tune on each of several episodes, many of them at once.

    Each result is what the episode gives alone with the seed
    ``episode_seed(config.seed, episode.index)``, up to rounding: what the others are plays no part.
    Where memory runs out, half as many are trained at once, with a warning.

    Args:
        model, tokenizer, config, lora_init, savings, checkpoint: As for :func:`finetune_episode`.
        episodes: Their classes and images. Those of equal numbers of classes and images are
            trained together.
        parallel: Most episodes trained at once; "auto": as many as fit into memory; ``None``: all
            that can be. In float16 each is trained alone: a gradient that overflows makes a
            training skip that step and lower its loss scale, which would touch the others.
        on_step: Called with the episode's position, the step from 0, and its loss.

    Returns:
        One entry an episode, in their order: its result, or the error where its loss became NaN or
        infinite, which does not touch the others.

    Raises:
        ValueError, TypeError: Unsuitable images, labels, names, model or ``parallel``.
        torch.OutOfMemoryError: Memory does not suffice for a single episode.
    """
    parallel = _resolve_parallel(parallel, config)
    alike: dict[tuple, list[int]] = {}
    for position, episode in enumerate(episodes):
        _check_episode(episode)
        images = (episode.support_images.shape, episode.query_images.shape)
        alike.setdefault((len(episode.class_names), *images), []).append(position)
    results: dict[int, EpisodeResult | NonFiniteLossError] = {}

    def run(positions: list[int]) -> None:
        def note_step(index: int, step: int, loss: float) -> None:
            if on_step is not None:
                on_step(positions[index], step, loss)

        chosen = [episodes[position] for position in positions]
        seeds = [episode_seed(config.seed, episode.index) for episode in chosen]
        try:
            with with_one_memory_error():
                found = _finetune_batch(
                    model,
                    tokenizer,
                    chosen,
                    seeds,
                    config,
                    lora_init,
                    None if on_step is None else note_step,
                    savings,
                    checkpoint,
                )
        except torch.OutOfMemoryError:
            if len(positions) == 1:
                raise
            found = None  # and on outside of the handler, whose traceback holds the memory
        if found is not None:
            results.update(zip(positions, found, strict=True))
            return
        half = (len(positions) + 1) // 2
        warnings.warn(
            f"{len(positions)} episodes at once do not fit into the memory of {config.device}; "
            f"going on with {half}",
            stacklevel=3,
        )
        run(positions[:half])
        run(positions[half:])

    for positions in alike.values():
        size = len(positions)
        if isinstance(parallel, int):
            size = parallel
        elif parallel == "auto" and size > 1:
            size = episodes_that_fit(
                model, tokenizer, episodes[positions[0]], config, savings, checkpoint
            )
        for first in range(0, len(positions), size):
            run(positions[first : first + size])
    return [results[position] for position in range(len(episodes))]


def trains_alone(config: FewShotConfig) -> bool:
    """Whether an episode is trained by itself: in float16, whose loss scale can't be shared."""
    return config.precision == "float16" and config.method != "zero-shot"


def _resolve_parallel(parallel: int | str | None, config: FewShotConfig) -> int | str | None:
    if parallel is None or parallel == "auto":
        return 1 if trains_alone(config) else parallel
    number = whole_number("parallel", parallel, "an int, 'auto' or None")
    if number < 1:
        raise ValueError(f"parallel must be at least 1; got {number}")
    if number > 1 and trains_alone(config):
        raise ValueError(
            f"parallel must be 1 with precision='float16', whose loss scale episodes can't share; "
            f"got {number}: use precision='bfloat16' to train several at once"
        )
    return number


def _finetune_batch(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    episodes: Sequence[Episode],
    seeds: Sequence[int],
    config: FewShotConfig,
    lora_init: Mapping[str, Tensor] | None,
    on_step: Callable[[int, int, float], None] | None,
    savings: Savings,
    checkpoint: bool,
) -> list[EpisodeResult | NonFiniteLossError]:
    """Results of episodes of one shape, trained at once."""
    device = torch.device(config.device)

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(episode, name) for episode in episodes]).to(device)

    with ExitStack() as stack:
        _prepare(stack, model, config, savings)
        support_images, query_images = stacked("support_images"), stacked("query_images")
        support_labels = stacked("support_labels").long()
        names = [episode.class_names for episode in episodes]
        batch = EpisodeBatch(
            model, tokenizer, names, seeds, config, stack, lora_init, savings, checkpoint
        )
        losses: list[list[float]] = [[] for _ in episodes]
        if config.method != "zero-shot":
            losses = batch.train(support_images, support_labels, on_step)
        support_logits, query_logits = batch.classify(support_images, query_images)
        correct = support_logits.argmax(2) == support_labels.cpu()
        results: list[EpisodeResult | NonFiniteLossError] = []
        for index, own in enumerate(losses):
            if own and not math.isfinite(own[-1]):
                results.append(NonFiniteLossError(len(own) - 1, own))
                continue
            result = EpisodeResult(
                losses=own,
                query_logits=query_logits[index],
                support_accuracy=correct[index].float().mean().item(),
            )
            results.append(replace(result, **batch.trained_tensors(index)))
        return results


def episodes_that_fit(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    episode: Episode,
    config: FewShotConfig,
    savings: Savings = _ALL_SAVINGS,
    checkpoint: bool = False,
) -> int:
    """How many episodes like this one can be trained at once in the memory that is free.

    One forward pass shows what a step keeps for its gradients. On a CPU more than a few images at
    once gain nothing, so that there the number is small in any case.

    Args:
        As for :func:`finetune_episode`.

    Returns:
        At least 1; in float16 1, see :func:`finetune_episodes`.

    Raises:
        torch.OutOfMemoryError: Memory does not suffice for this one.
    """
    _check_episode(episode)
    if config.method == "zero-shot" or trains_alone(config):
        return 1
    device = torch.device(config.device)
    with with_one_memory_error(), ExitStack() as stack:
        _prepare(stack, model, config, savings)
        names, seeds = [episode.class_names], [config.seed]
        batch = EpisodeBatch(
            model, tokenizer, names, seeds, config, stack, None, savings, checkpoint
        )
        images = episode.support_images[None].to(device)
        needed = batch.bytes_of_a_step(images, episode.support_labels[None].to(device).long())
    fitting = int(_USABLE_SHARE * available_bytes(device) / (_STEP_FACTOR * needed))
    if device.type == "cpu":
        fitting = min(fitting, _CPU_IMAGES // len(episode.support_images))
    return max(1, fitting)


def _prepare(stack: ExitStack, model: nn.Module, config: FewShotConfig, savings: Savings) -> None:
    """Bring the model into the state in which it is trained, until the stack unwinds."""
    device = torch.device(config.device)
    # Whatever the caller is in the midst of.
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    stack.enter_context(_in_evaluation_mode(model))
    stack.enter_context(_with_gradients(model, not savings.frozen_weights))
    cuda_devices = [device] if device.type == "cuda" else []
    stack.enter_context(torch.random.fork_rng(devices=cuda_devices))
    if savings.fused_layers:
        stack.enter_context(towers.frozen_mlps(model))
    if config.precision != "float32":
        dtype = getattr(torch, config.precision)
        # What autocast remembered from the steps before would not be part of a step's graph.
        stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        if savings.fused_layers:
            stack.enter_context(towers.cast_blocks(model, dtype))


def _check_episode(episode: Episode) -> None:
    support_images, support_labels = episode.support_images, episode.support_labels
    class_names = episode.class_names
    for name in ("support_images", "query_images"):
        images = getattr(episode, name)
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"{name} must have shape (images, 3, H, W); got {tuple(images.shape)}")
    if len(class_names) < 2:
        raise ValueError(f"class_names must hold at least 2 classes; got {len(class_names)}")
    if len(support_images) == 0:
        raise ValueError("support_images must hold at least one image")
    if support_labels.shape != support_images.shape[:1]:
        raise ValueError(
            f"support_labels must have one label for each of the {len(support_images)} support "
            f"images; got shape {tuple(support_labels.shape)}"
        )
    if support_labels.is_floating_point() or support_labels.dtype == torch.bool:
        raise TypeError(f"support_labels must be integers; got {support_labels.dtype}")
    if support_labels.min() < 0 or support_labels.max() >= len(class_names):
        raise ValueError(
            f"support_labels must lie between 0 and {len(class_names) - 1}; got "
            f"{int(support_labels.min())} to {int(support_labels.max())}"
        )


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _with_gradients(model: nn.Module, has_gradients: bool) -> Iterator[None]:
    """Let the model's own parameters have gradients or not; in the end all is as it was."""
    before = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    for parameter, _, _ in before:
        parameter.requires_grad_(has_gradients)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, was_trainable, gradient in before:
            parameter.requires_grad_(was_trainable)
            parameter.grad = gradient
