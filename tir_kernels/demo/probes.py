"""What a model of the source domain knows: zero-shot accuracies on held-out drawings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tir_kernels.demo.captions import CHOICES, Scene, describe
from tir_kernels.demo.everyday import SourceDrawing, draw_source

CAPTIONS = 128  # to choose from
HELD_OUT_STREAM = 1
PIXEL_MEAN, PIXEL_DEVIATION = 0.5, 0.5
Tokenizer = Callable[[list[str]], Tensor]


class Reached(NamedTuple):
    """An accuracy, 0..1, of `asked` answers, and the one that guessing reaches."""

    accuracy: float
    chance: float
    asked: int


class _Probe(NamedTuple):
    choices: tuple[str, ...]
    group: bool | None  # as draw_source takes it


# The drawings that an attribute is asked of are those that show it: single objects have a shape,
# a texture and a position, groups have a number. "One" is told by grammar alone, and left out.
PROBES = {
    "shape": _Probe(CHOICES["shape"], False),
    "colour": _Probe(CHOICES["colour"], None),
    "texture": _Probe(CHOICES["texture"], False),
    "number": _Probe(CHOICES["number"][1:], True),
    "position": _Probe(CHOICES["position"], False),
    "size": _Probe(CHOICES["size"], False),
    "background": _Probe(CHOICES["background"], None),
}


def as_images(drawings: list[SourceDrawing]) -> Tensor:
    """Stack drawings into (B, 3, 64, 64) float32, normalised as the model's configuration says."""
    pixels = torch.from_numpy(np.stack([drawing.pixels for drawing in drawings]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_DEVIATION


def naming(attribute: str, choice: str) -> str:
    """Words for one attribute alone: "a star", "two things", "something red"."""
    words = dict.fromkeys(Scene._fields, "") | {"number": "one", attribute: choice}
    return describe(Scene(**words), (attribute,))


@torch.no_grad()
def zero_shot(
    model: Any,
    tokenizer: Tokenizer,
    attribute: str,
    *,
    count: int,
    seed: int = 0,
    stream: int = HELD_OUT_STREAM,
) -> Reached:
    """Share of held-out drawings whose attribute is named rightly by the nearest caption."""
    choices, group = PROBES[attribute]
    captions = tokenizer([f"a photo of {naming(attribute, choice)}" for choice in choices])
    classes = model.encode_text(captions, normalize=True)
    right, asked, index = 0, 0, 0
    while asked < count:
        drawings = [
            draw_source(index + place, seed=seed, stream=stream, group=group) for place in range(64)
        ]
        index += 64
        shown = [d for d in drawings if getattr(d.scene, attribute) in choices][: count - asked]
        truth = torch.tensor([choices.index(getattr(d.scene, attribute)) for d in shown])
        guesses = (model.encode_image(as_images(shown)) @ classes.T).argmax(dim=1)
        right += int((guesses == truth).sum())
        asked += len(shown)
    return Reached(right / asked, 1 / len(choices), asked)


@torch.no_grad()
def caption_accuracy(
    model: Any, tokenizer: Tokenizer, *, groups: int, seed: int = 0, stream: int = HELD_OUT_STREAM
) -> Reached:
    """Share of held-out drawings, in `groups` of 128, whose own caption is picked out of all."""
    right = 0
    for group in range(groups):
        drawings = [
            draw_source(group * CAPTIONS + place, seed=seed, stream=stream)
            for place in range(CAPTIONS)
        ]
        captions = tokenizer([f"a photo of {drawing.caption}" for drawing in drawings])
        classes = model.encode_text(captions, normalize=True)
        guesses = (model.encode_image(as_images(drawings)) @ classes.T).argmax(dim=1)
        right += int((guesses == torch.arange(CAPTIONS)).sum())
    return Reached(right / (groups * CAPTIONS), 1 / CAPTIONS, groups * CAPTIONS)


def everything(
    model: Any, tokenizer: Tokenizer, *, count: int, seed: int = 0, stream: int = HELD_OUT_STREAM
) -> dict[str, Reached]:
    """All probes of `count` drawings each, and captions of about as many."""
    model.eval()
    where = {"seed": seed, "stream": stream}
    groups = max(1, count // CAPTIONS)
    return {
        "caption": caption_accuracy(model, tokenizer, groups=groups, **where),
        **{name: zero_shot(model, tokenizer, name, count=count, **where) for name in PROBES},
    }
