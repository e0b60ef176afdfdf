"""Episodes: which classes and images, decided by the seed and the episode's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class EpisodePlan:
    """The classes and image names of an episode, before any image is read.

    Args:
        index: The episode's number.
        classes: Its classes, as positions in the data's list.
        orders: Per class, all its images in drawing order: the first serve as support, the next as
            queries, and the rest replace those that turn out to be unreadable.
        query_orders: Per class, the images of the part for queries in drawing order; empty: queries
            follow support in ``orders``.
    """

    index: int
    classes: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    query_orders: tuple[tuple[int, ...], ...] = ()


class Images(Protocol):
    """Images that are had in parts: a tensor (N, 3, H, W), or what reads them when asked.

    Attributes:
        shape: (N, 3, H, W).
    """

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of the images, float32."""


@dataclass(frozen=True)
class Episode:
    """An episode's images, grouped by class in the order of ``class_names``.

    Args:
        class_names: The words of its C classes.
        support_images: (S, 3, H, W) float32, S = C * shots, or with N augmented views of each image
            C * shots * (1 + N), where each image's views follow it.
        support_labels: (S,) int64 in [0, C).
        query_images: (Q, 3, H, W) float32, a tensor or ``Images`` that are read when they are
            classified; Q is C * queries, or any number where these are all; it may be 0.
        index: The episode's number.
        query_labels: (Q,) int64 in [0, C); for scoring only.
        folders: The folder names of the classes.
        skipped: Unreadable images that others replaced.
        shots: Support images per class without their views; ``None``: S / C.
        views_per_image: Support images in a row that are views of one; ``None``: what ``shots``
            says. Classes of unequal size have these and no ``shots``.
        support_names, query_names: (S,) and (Q,) names by which the same pixels are known again in
            another episode, ``None`` for views that are of this one alone; empty: there are none.
    """

    class_names: list[str]
    support_images: Tensor
    support_labels: Tensor
    query_images: Images
    index: int = 0
    query_labels: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu")
    )
    folders: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    shots: int | None = None
    views_per_image: int | None = None
    support_names: tuple[str | None, ...] = ()
    query_names: tuple[str | None, ...] = ()

    @property
    def images_per_class(self) -> int:
        """Support images per class without their views; of unequal classes the mean, rounded."""
        if self.shots is not None:
            return self.shots
        return max(1, len(self.support_images) // (len(self.class_names) * self.views))

    @property
    def views(self) -> int:
        """Support images in a row that are views of one, itself included."""
        if self.views_per_image is not None:
            return self.views_per_image
        if self.shots is None:
            return 1
        return len(self.support_images) // (len(self.class_names) * self.shots)

    def check(self) -> None:
        """Refuse images, labels or names that no training can take.

        Raises:
            ValueError, TypeError: What is wrong, by its name.
        """
        support_images, support_labels = self.support_images, self.support_labels
        class_names = self.class_names
        for name in ("support_images", "query_images"):
            images = getattr(self, name)
            if len(images.shape) != 4 or images.shape[1] != 3:
                raise ValueError(
                    f"{name} must have shape (images, 3, H, W); got {tuple(images.shape)}"
                )
        if len(class_names) < 2:
            raise ValueError(f"class_names must hold at least 2 classes; got {len(class_names)}")
        if len(support_images) == 0:
            raise ValueError("support_images must hold at least one image")
        if support_labels.shape != support_images.shape[:1]:
            raise ValueError(
                f"support_labels must have one label for each of the {len(support_images)} support "
                f"images; got shape {tuple(support_labels.shape)}"
            )
        if self.shots is not None:
            needed = len(class_names) * self.shots
            if self.shots < 1 or len(support_images) % needed:
                raise ValueError(
                    f"shots={self.shots} of {len(class_names)} classes take {needed} support "
                    f"images, or several views of each; got {len(support_images)}"
                )
        views = self.views_per_image
        if views is not None and (views < 1 or len(support_images) % views):
            raise ValueError(
                f"views_per_image={views} must divide the {len(support_images)} support images"
            )
        if support_labels.is_floating_point() or support_labels.dtype == torch.bool:
            raise TypeError(f"support_labels must be integers; got {support_labels.dtype}")
        if support_labels.min() < 0 or support_labels.max() >= len(class_names):
            raise ValueError(
                f"support_labels must lie between 0 and {len(class_names) - 1}; got "
                f"{int(support_labels.min())} to {int(support_labels.max())}"
            )


def plan_episode(
    seed: int,
    index: int,
    class_sizes: Sequence[int],
    ways: int,
    query_sizes: Sequence[int] = (),
) -> EpisodePlan:
    """Draw the classes and the order of their images.

    The result depends on the arguments only, so that any process can draw any episode.

    Args:
        seed: Of the run, at least 0.
        index: The episode's number, at least 0.
        class_sizes: Images per class.
        ways: Classes per episode.
        query_sizes: Images per class in the part for queries, where there is one.
    """
    random = random_state(seed, index, stream=0)
    classes = random.permutation(len(class_sizes))[:ways]
    orders = tuple(tuple(random.permutation(class_sizes[c]).tolist()) for c in classes)
    query_orders: tuple[tuple[int, ...], ...] = ()
    if query_sizes:
        query_orders = tuple(tuple(random.permutation(query_sizes[c]).tolist()) for c in classes)
    return EpisodePlan(index, tuple(classes.tolist()), orders, query_orders)


def episode_seed(seed: int, index: int) -> int:
    """The seed of an episode's training, the same for every method."""
    return int(random_state(seed, index, stream=1).randint(2**31))


def random_state(seed: int, index: int, *, stream: int) -> np.random.RandomState:
    """Random numbers of a seed, an episode's number and a stream; 2 is for augmented views."""
    # RandomState rather than Generator: NumPy promises that its numbers never change, so a run
    # that is continued after an upgrade sees the same episodes.
    sequence = np.random.SeedSequence([seed, index, stream])
    return np.random.RandomState(np.random.MT19937(sequence))
