"""What methods on frozen features are tested on: features and texts as NumPy has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from fewshot.training_cases import NAMES, draw_episode, make_tokenizer
from torch import nn

from tir_kernels.fewshot import Episode, EpisodeResult, Runtime, finetune_episode
from tir_kernels.fewshot.methods import Method
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.train.batch import Job


def learn(model: nn.Module, method: Method, episode: Episode) -> EpisodeResult:
    return finetune_episode(model, make_tokenizer(), episode, method)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def with_views(views: int, labels: tuple[int, ...] = (0, 0, 1, 1, 2, 2)) -> Episode:
    """An episode of six images, with more views of each, which follow it."""
    episode = draw_episode(3, NAMES[1])
    generator = torch.Generator().manual_seed(1)
    images = episode.support_images.repeat_interleave(views, 0)
    noise = 0.5 * torch.randn(images.shape, generator=generator)
    noise[::views] = 0
    own = torch.tensor(labels).repeat_interleave(views)
    return replace(
        episode, support_images=images + noise, support_labels=own, views_per_image=views
    )


class Parts(NamedTuple):
    """Features in float64: rows of all views, images without views, queries, texts, one-hots."""

    rows: np.ndarray  # (N V, E), not normalised
    images: np.ndarray  # (N, E), of unit length, as the queries and texts
    queries: np.ndarray
    texts: np.ndarray
    classes: np.ndarray  # (N, C)


def parts_of(model: nn.Module, episode: Episode) -> Parts:
    job = Job(model, make_tokenizer(), ZeroShot(), 0, Runtime())
    with job.learner([episode]) as learner, torch.no_grad():
        texts = learner.classes()[0].double().numpy()
        rows, queries = (
            model.encode_image(images).double().numpy()
            for images in (episode.support_images, episode.query_images)
        )
    views = episode.views
    images = unit(rows.reshape(-1, views, rows.shape[1]).mean(1))
    classes = np.eye(len(texts))[episode.support_labels[::views].numpy()]
    return Parts(rows, images, unit(queries), texts, classes)


def stepped(
    logits: Callable[[], torch.Tensor],
    labels: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    rates: list[float],
    penalty: Callable[[], Any] = lambda: 0.0,
) -> list[float]:
    """The losses of plain steps of cross entropy at these learning rates."""
    losses = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        loss = torch.nn.functional.cross_entropy(logits(), labels) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def warmed(rate: float, steps: int) -> list[float]:
    """One step at 1e-5, then half a cosine that would reach 0 a step behind the last."""
    later = [rate * (1 + np.cos(np.pi * step / steps)) / 2 for step in range(steps - 1)]
    return [1e-5, *later]


def falling(rate: float, steps: int) -> list[float]:
    return [rate * (1 + np.cos(np.pi * step / steps)) / 2 for step in range(steps)]
