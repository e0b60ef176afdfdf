"""An observer that keeps arrays for pictures: how an arm's image tower sees the support images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tir_kernels import WeightRule, token_relevance, token_weights
from tir_kernels.adapters import Reweighting
from tir_kernels.adapters.handle import handles_on
from tir_kernels.analysis import measure
from tir_kernels.analysis.measures import BlockView
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Learner, Method, Observer
from tir_kernels.fewshot.run.maps import Maps
from tir_kernels.towers import vision_tower


class Seen(NamedTuple):
    """What the tower made of the images in one pass; G episodes of n images."""

    relevance: Tensor  # (G n, C, N)
    counts: Tensor  # (G n, N)
    weights: Tensor  # (G n, N)
    received: Tensor  # (G n, N)
    tokens: Tensor  # (blocks, G n, D)


class MapMaker(Observer):
    """Maps of each episode, before the first step of its training and after the last.

    Args:
        model: The model that is trained.
        method: The arm's method.
        pixels: Function from the model's input (n, 3, S, S) to pixels (n, S, S, 3) uint8.
    """

    def __init__(
        self, model: nn.Module, method: Method, pixels: Callable[[Tensor], np.ndarray]
    ) -> None:
        self.every = max(method.steps, 1)
        self._model = model
        self._pixels = pixels
        self._episodes: Sequence[Episode] = ()
        self._before: dict[int, Seen] = {}  # by the episode's index
        self._after: dict[int, Seen] = {}

    def start(self, episodes: Sequence[Episode]) -> None:
        self._episodes = episodes

    def observe(self, step: int, learner: Learner, inputs: Tensor) -> None:
        if inputs.dim() != 4:
            return
        classes = learner.show_classes(learner.classes())
        assert classes is not None
        tokens = inputs[:, :: self._episodes[0].views]
        seen = self._see(tokens.flatten(0, 1), classes)
        for position, episode in enumerate(self._episodes):
            self._after[episode.index] = own = _of(seen, position, tokens.shape[1])
            if step == 0:
                self._before[episode.index] = own

    @torch.no_grad()
    def _see(self, tokens: Tensor, classes: Tensor) -> Seen:
        tower = vision_tower(self._model)
        handles = handles_on(self._model, Reweighting)
        reweighting = handles[0] if handles else None
        layers = () if reweighting is None else reweighting.layers
        layer = max(layers, default=max(len(tower.blocks) - 2, 0))
        seen = _Seeing(layer)
        measure(tower, tokens, [seen])
        view = seen.view
        assert view is not None
        space, prefix = tower.joint_space, view.num_prefix_tokens
        compared = tower.compared_tokens(view.hidden)
        if reweighting is not None:
            classes = reweighting.class_embeddings
            weights, counts = reweighting.weights(view.hidden, layer)
        else:
            weights, counts = token_weights(
                compared,
                classes,
                joint_space=space,
                rule=WeightRule("none"),
                num_prefix_tokens=prefix,
            )
        relevance = token_relevance(compared, classes, joint_space=space, num_prefix_tokens=prefix)
        return Seen(
            relevance,
            counts,
            weights[:, prefix:],
            view.received.mean(1)[:, prefix:],
            torch.stack(seen.tokens),
        )

    def maps(self, own: Episode, arm: str) -> Maps | None:
        """The maps of an episode that was trained; ``None`` where nothing was seen of it."""
        if own.index not in self._after:
            return None
        before, after = self._before[own.index], self._after[own.index]
        images, labels = (
            tensor[:: own.views].cpu() for tensor in (own.support_images, own.support_labels)
        )
        patches = after.weights.shape[1]
        most = after.relevance.shape[1]
        return Maps(
            episode=own.index,
            arm=arm,
            class_names=list(own.class_names),
            labels=labels.numpy().astype(np.int64),
            images=self._pixels(images),
            grid=_grid(patches, *images.shape[-2:]),
            relevance=_half(after.relevance),
            counts=after.counts.cpu().numpy().astype(np.uint8 if most < 256 else np.uint16),
            weights=_half(after.weights),
            received_before=_half(before.received),
            received_after=_half(after.received),
            tokens_before=_half(before.tokens),
            tokens_after=_half(after.tokens),
        )


class _Seeing:
    """A measure that finds nothing, and keeps what it sees of one block and of class tokens."""

    name = "seen"

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.view: BlockView | None = None
        self.tokens: list[Tensor] = []

    def of_block(self, view: BlockView) -> tuple[()]:
        if view.block == self._layer:
            self.view = view
        pooled = view.output[:, 0] if view.num_class_tokens else view.output.mean(1)
        self.tokens.append(pooled.float())
        return ()


def _of(seen: Seen, position: int, images: int) -> Seen:
    own = slice(position * images, (position + 1) * images)
    relevance, counts, weights, received = (each[own] for each in seen[:4])
    return Seen(relevance, counts, weights, received, seen.tokens[:, own])


def _half(values: Tensor) -> Any:
    largest = torch.finfo(torch.float16).max
    return values.float().clamp(-largest, largest).to(torch.float16).cpu().numpy()


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of square patches of an image."""
    rows = round(math.sqrt(patches * height / width))
    if rows < 1 or patches % rows:
        raise ValueError(f"{patches} patches do not tile an image of {height} x {width} pixels")
    return rows, patches // rows
