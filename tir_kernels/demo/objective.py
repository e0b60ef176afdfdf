"""The training objective of the demonstration's CLIP: captions, and attributes one by one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, normalize

from tir_kernels.demo.captions import CHOICES, PHRASES, Scene, describe
from tir_kernels.demo.everyday import SourceDrawing
from tir_kernels.demo.probes import Tokenizer, as_images, naming

GRID = 8  # patches per side
WINDOW = 4  # patches per side of a window
_SIZES = [len(choices) for choices in CHOICES.values()]
# What takes longest to learn counts more.
_WEIGHTS = {"shape": 3.0, "number": 2.0}
_NONE = -1  # an attribute that a scene has not, or that a caption leaves out


class Batch(NamedTuple):
    """Drawings and captions of one step.

    Attributes:
        images: (B, 3, 64, 64) float32.
        labels: (B, A) int64, the index of each attribute's choice; -1 for none.
        prompted: (B, A) int64, the labels of which a prompt is true.
        cover: (B, 64) float32, the share of each patch that objects cover.
        captions: (B, T) token ids.
        stated: (B, A) int64, the labels that each caption states; -1 for those it leaves out.
        prompts: (P, T) token ids: captions of one attribute alone, for all choices in order.
    """

    images: Tensor
    labels: Tensor
    prompted: Tensor
    cover: Tensor
    captions: Tensor
    stated: Tensor
    prompts: Tensor


def _labels(scene: Scene) -> list[int]:
    return [
        choices.index(word) if (word := getattr(scene, name)) in choices else _NONE
        for name, choices in CHOICES.items()
    ]


def make_batch(
    drawings: list[SourceDrawing], rng: np.random.Generator, tokenizer: Tokenizer
) -> Batch:
    """Caption drawings and label them; about half of the captions leave out some attributes."""
    names = tuple(CHOICES)
    labels = torch.tensor([_labels(drawing.scene) for drawing in drawings])
    full = rng.random((len(drawings), 1)) < 0.5
    mentioned = full | (rng.random((len(drawings), len(names))) < 0.5)
    # A noun phrase with a shape says how many there are, and without either it says neither.
    shape, number = names.index("shape"), names.index("number")
    mentioned[:, number] |= mentioned[:, shape]
    captions = []
    for drawing, row in zip(drawings, mentioned, strict=True):
        stated = [name for name, is_stated in zip(names, row, strict=True) if is_stated]
        phrase = PHRASES[rng.integers(len(PHRASES))]
        captions.append(phrase.format(describe(drawing.scene, stated)))
    phrase = PHRASES[rng.integers(len(PHRASES))]
    prompts = [
        phrase.format(naming(name, word)) for name, words in CHOICES.items() for word in words
    ]
    prompted = labels.clone()
    prompted[labels[:, number] > 0, shape] = _NONE  # the prompt names one thing of each shape
    cover = torch.from_numpy(np.stack([drawing.cover for drawing in drawings])).float()
    return Batch(
        as_images(drawings),
        labels,
        prompted,
        avg_pool2d(cover[:, None], cover.shape[-1] // GRID).flatten(1),
        tokenizer(captions),
        labels.where(torch.from_numpy(mentioned), _NONE),
        tokenizer(prompts),
    )


class Heads(nn.Module):
    """Linear readings of every attribute from class and patch tokens; of use in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_class = nn.Linear(width, sum(_SIZES))
        self.from_patches = nn.Linear(width, sum(_SIZES) + 1)  # and whether an object is there


def _windows(cover: Tensor) -> Tensor:
    """Indices (B, 16) of the patches in the window that shows most of an image's objects."""
    shares = avg_pool2d(cover.view(-1, 1, GRID, GRID), WINDOW, stride=1).flatten(1)
    first = shares.argmax(dim=1)
    places = GRID - WINDOW + 1
    corner = first // places * GRID + first % places
    inside = torch.arange(WINDOW)
    return corner[:, None] + (inside[:, None] * GRID + inside).flatten()


def _tokens(visual: Any, batch: Batch, patches: Tensor | None) -> Tensor:
    """Normalised tokens (B, 1 + N, D) of the last block, of all patches or of those named."""
    tokens = visual._embeds(batch.images)
    if patches is not None:
        index = torch.cat([torch.zeros_like(patches[:, :1]), patches + 1], dim=1)
        tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    return visual.ln_post(visual.transformer(tokens))


def _by_attribute(logits: Tensor, labels: Tensor, names: Collection[str]) -> Tensor:
    """Weighted mean, over attributes, of the cross-entropy of logits (B, P) where labels are."""
    total, weights = logits.new_zeros(()), 0.0
    for name, part, known in zip(CHOICES, logits.split(_SIZES, 1), labels.T, strict=True):
        is_known = known >= 0
        if name in names and bool(is_known.any()):
            weight = _WEIGHTS.get(name, 1.0)
            total = total + weight * cross_entropy(part[is_known], known[is_known])
            weights += weight
    return total / max(weights, 1.0)


def _contrastive(logits: Tensor, truth: Tensor) -> Tensor:
    """CLIP's loss where several captions may be true of an image: (B, B) logits and truth."""
    both = [
        -(rows.log_softmax(dim=1) * true).sum(dim=1) / true.sum(dim=1)
        for rows, true in ((logits, truth.float()), (logits.T, truth.T.float()))
    ]
    return torch.stack(both).mean()


def losses(model: Any, heads: Heads, batch: Batch, *, windows: bool) -> dict[str, Tensor]:
    """The parts of the objective; their sum is to be minimised.

    With `windows` the image tower sees 4 x 4 patches of each image, those around an object, for a
    quarter of the cost; the number, which only the whole image tells, is then not asked for by
    itself.
    """
    visual = model.visual
    patches = _windows(batch.cover) if windows else None
    tokens = _tokens(visual, batch, patches)
    image_features = normalize(tokens[:, 0] @ visual.proj, dim=-1)
    texts = torch.cat([batch.captions, batch.prompts])
    text_features = model.encode_text(texts, normalize=True)
    scores = model.logit_scale.exp() * image_features @ text_features.T
    count = len(batch.images)
    # A caption is true of every image that has what it states.
    stated, labels = batch.stated[None], batch.labels[:, None]
    truth = ((stated == _NONE) | (stated == labels)).all(dim=2)

    asked = [name for name in CHOICES if not (windows and name == "number")]
    cover = batch.cover if patches is None else batch.cover.gather(1, patches)
    on_object = cover > 0.3
    readings = heads.from_patches(tokens[:, 1:])
    owners = batch.labels[:, None].expand(-1, cover.shape[1], -1)[on_object]
    return {
        "caption": _contrastive(scores[:, :count], truth),
        "prompt": _by_attribute(scores[:, count:], batch.prompted, asked),
        "class": _by_attribute(heads.from_class(tokens[:, 0]), batch.labels, asked),
        "patch": _by_attribute(readings[on_object][:, :-1], owners, ["shape", "colour", "texture"])
        + nn.functional.binary_cross_entropy_with_logits(readings[..., -1], on_object.float()),
    }
