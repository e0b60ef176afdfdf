"""The few-shot engine without one of its exact savings at a time; parts of it are swapped here.

Each saving leaves out work that no result depends on. To show what it is worth, and that results
stay the same, the engine runs with the wasteful part in its place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tir_kernels import adapters, towers
from tir_kernels.fewshot.methods import Kit, Learner, Method, prompts
from tir_kernels.fewshot.train import batch


def _embedding_at_each_step(learner: Any) -> None:
    """The patch embedding, which is frozen, runs at each step and not once an episode."""
    embed, logits = learner.inputs, learner.logits

    def from_images(images: Tensor, classes: Any) -> Tensor:
        with torch.no_grad():
            tokens = embed(images)
        return logits(tokens, classes)

    learner.inputs, learner.logits = lambda images: images, from_images


def _text_pass_for_each_batch(learner: Any) -> None:
    """Classifying takes a text pass for each batch of images and not one for all."""
    classes, logits = learner.classes, learner.logits
    learner.classes, learner.logits = lambda: None, lambda inputs, _: logits(inputs, classes())


def _formed_products(learner: Any) -> None:
    """LoRA forms B A and multiplies with it, not with its two factors."""
    learner.lora.form_products()


class _Uncut(adapters.PromptContext):
    """Prompts that fill the whole context, and do not end with the longest one's end of text."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, cut=False, **options)


@contextmanager
def _with_gradients(model: nn.Module) -> Iterator[None]:
    """The model's own weights get gradients too."""
    with _FROZEN(model):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        yield


def _step_without_graph(
    step: Callable[[], Tensor], device: torch.device, as_graph: bool
) -> batch.RepeatedStep:
    """On CUDA, a training step is launched kernel by kernel."""
    return _REPEATED_STEP(step, device, False)


_REPEATED_STEP = batch.RepeatedStep
_FROZEN = batch.frozen
_WHOLE_LAST_BLOCK = functools.partial(towers.ImageEncoder, class_token_only=False)

# Saving -> what is done to the learner without it.
_LEARNERS: dict[str, Callable[[Any], None]] = {
    "cache_patch_embedding": _embedding_at_each_step,
    "low_rank_products": _formed_products,
    "shared_text_pass": _text_pass_for_each_batch,
}
# Saving -> (owner, name, replacement) of parts of the engine without it.
_PARTS: dict[str, list[tuple[Any, str, Any]]] = {
    "class_token_only": [(towers, "ImageEncoder", _WHOLE_LAST_BLOCK)],
    "cut_prompts": [(prompts, "PromptContext", _Uncut)],
    "frozen_weights": [(batch, "frozen", _with_gradients)],
    "image_batches": [(batch, "CLASSIFIED_AT_ONCE", 1)],
    "fused_layers": [
        (towers, "frozen_mlps", lambda model, backend: nullcontext()),
        (towers, "frozen_norms", lambda model, backend: nullcontext()),
        (towers, "cast_blocks", lambda model, dtype: nullcontext()),
    ],
    "packed_matrices": [(batch, "packed_matrices", lambda model: ())],
    "step_graph": [(batch, "RepeatedStep", _step_without_graph)],
}
SAVINGS = (*_LEARNERS, *_PARTS)


@contextmanager
def without(method: Method, *savings: str) -> Iterator[Method]:
    """A method to train with, in a context in which the engine goes without these savings."""
    with contextlib.ExitStack() as stack:
        for saving in savings:
            parts = _PARTS.get(saving)
            if parts is None:
                start = _changed(type(method).start, _LEARNERS[saving])
                parts = [(type(method), "start", start)]
            for owner, name, replacement in parts:
                stack.enter_context(mock.patch.object(owner, name, replacement))
        yield method


def _changed(start: Callable, change: Callable[[Any], None]) -> Callable:
    """The start of a method whose learner is changed once it has started."""

    @contextmanager
    def changed_start(method: Method, kit: Kit) -> Iterator[Learner]:
        with start(method, kit) as learner:
            change(learner)
            yield learner

    return changed_start
