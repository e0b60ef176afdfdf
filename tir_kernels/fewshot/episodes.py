"""Episodes: which classes and images, decided by the seed and the episode's number alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tir_kernels.fewshot.augment import with_views
from tir_kernels.fewshot.data import ImageData
from tir_kernels.fewshot.errors import FewShotError
from tir_kernels.fewshot.images import ImageReader


@dataclass(frozen=True)
class EpisodePlan:
    """What an episode is drawn from, before any image is read.

    Args:
        index: The episode's number.
        classes: Its classes, as positions in the data's list.
        orders: Per class, all its images in drawing order: the first serve as support, the next as
            queries, and the rest replace those that turn out to be unreadable.
    """

    index: int
    classes: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Episode:
    """An episode's images, grouped by class in the order of ``class_names``.

    Args:
        class_names: The words of its C classes.
        support_images: (S, 3, H, W) float32, S = C * shots, or with N augmented views of each image
            C * shots * (1 + N), where each image's views follow it.
        support_labels: (S,) int64 in [0, C).
        query_images: (Q, 3, H, W) float32, Q = C * queries.
        index: The episode's number.
        query_labels: (Q,) int64 in [0, C); for scoring only.
        folders: The folder names of the classes.
        skipped: Unreadable images that others replaced.
    """

    class_names: list[str]
    support_images: Tensor
    support_labels: Tensor
    query_images: Tensor
    index: int
    query_labels: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu")
    )
    folders: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def plan_episode(seed: int, index: int, class_sizes: Sequence[int], ways: int) -> EpisodePlan:
    """Draw the classes and the order of their images.

    The result depends on the arguments only, so that any process can draw any episode.

    Args:
        seed: Of the run, at least 0.
        index: The episode's number, at least 0.
        class_sizes: Images per class.
        ways: Classes per episode.
    """
    random = _random(seed, index, stream=0)
    classes = random.permutation(len(class_sizes))[:ways]
    orders = tuple(tuple(random.permutation(class_sizes[c]).tolist()) for c in classes)
    return EpisodePlan(index, tuple(classes.tolist()), orders)


def episode_seed(seed: int, index: int) -> int:
    """The seed of an episode's training, the same for every method."""
    return int(_random(seed, index, stream=1).randint(2**31))


def load_episode(
    plan: EpisodePlan,
    data: ImageData,
    images: ImageReader,
    *,
    shots: int,
    queries: int,
    device: str | torch.device = "cpu",
    augment: int = 0,
    seed: int = 0,
) -> Episode:
    """Read an episode's images.

    Args:
        plan: Which.
        data: Their classes.
        images: Reads them.
        shots: Support images per class.
        queries: Query images per class.
        device: Where the images are normalised and augmented, and left; labels stay on the CPU.
        augment: Augmented views of each support image, see ``draw_views``.
        seed: Of the run, which decides the views together with the episode's number.

    Raises:
        FewShotError: An image can't be read, or too few of a class can.
    """
    support: list[Tensor] = []
    query: list[Tensor] = []
    skipped: list[str] = []
    classes = [data.classes[c] for c in plan.classes]
    needed = shots + queries
    # All that are needed if all are readable at once, so that they are decoded side by side.
    first = images.read_many(
        [
            (entry, position)
            for entry, order in zip(classes, plan.orders, strict=True)
            for position in order[:needed]
        ]
    )
    drawn = iter(first)
    for entry, order in zip(classes, plan.orders, strict=True):
        readable: list[Tensor] = []
        drawn_of_class = list(itertools.islice(drawn, len(order[:needed])))
        for number, position in enumerate(order):
            if len(readable) == needed:
                break
            image = drawn_of_class[number] if number < needed else images.read(entry, position)
            if image is None:
                skipped.append(entry.files[position])
            else:
                readable.append(image)
        if len(readable) < needed:
            raise FewShotError(
                f"class {entry.folder!r} in {data.name} has {len(readable)} readable images but "
                f"{needed} are needed ({shots} shots + {queries} queries); "
                "add images, or lower --shots or --queries"
            )
        support += readable[:shots]
        query += readable[shots:]
    support_pixels, query_pixels = (torch.stack(each).to(device) for each in (support, query))
    if augment:
        support_pixels = with_views(support_pixels, augment, _random(seed, plan.index, stream=2))
    labels = torch.arange(len(classes), device="cpu")
    return Episode(
        class_names=[entry.words for entry in classes],
        support_images=images.preprocess.normalise(support_pixels),
        support_labels=labels.repeat_interleave(shots * (1 + augment)),
        query_images=images.preprocess.normalise(query_pixels),
        index=plan.index,
        query_labels=labels.repeat_interleave(queries),
        folders=tuple(entry.folder for entry in classes),
        skipped=tuple(skipped),
    )


def _random(seed: int, index: int, *, stream: int) -> np.random.RandomState:
    # RandomState rather than Generator: NumPy promises that its numbers never change, so a run
    # that is continued after an upgrade sees the same episodes.
    sequence = np.random.SeedSequence([seed, index, stream])
    return np.random.RandomState(np.random.MT19937(sequence))
