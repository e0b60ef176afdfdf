"""Reading the images of an episode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Set

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import (
    ImageClass,
    ImageData,
    lower_sizes,
    sizes_in_words,
)
from tir_kernels.fewshot.data.queries import QueryImages
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.views import views_per_image, with_views
from tir_kernels.fewshot.episode import Episode, EpisodePlan, Images, random_state

_HELD_BYTES = 128 * 2**20  # most pixels of queries that are held; as float32 four times as much


def load_episode(
    plan: EpisodePlan,
    data: ImageData,
    images: ImageReader,
    *,
    shots: int,
    queries: int | None,
    device: str | torch.device = "cpu",
    augment: int | str = 0,
    seed: int = 0,
) -> Episode:
    """Read an episode's images.

    Args:
        plan: Plan of the episode.
        data: Data that it draws from.
        images: Reader of the images.
        shots: Support images per class.
        queries: Query images per class; ``None``: all that are not support and of none of its
            groups. Where they are too many to be held, they are read when they are classified.
        device: Device on which the images are normalised and augmented, and left; labels stay on
            the CPU.
        augment: Augmented views of each support image, see ``with_views``.
        seed: Seed of the run, which decides the views together with the episode's number.

    Raises:
        FewShotError: An image can't be read, or too few of a class can.
    """
    classes = [data.classes[c] for c in plan.classes]
    drawing = _Drawing(plan, data, images, shots, queries)
    support = [drawing.support(c) for c in range(len(classes))]
    query_counts, query_images = drawing.queries(device)
    support_pixels = torch.stack(list(itertools.chain(*support))).to(device)
    if augment:
        support_pixels = with_views(
            support_pixels, augment, random_state(seed, plan.index, stream=2)
        )
    labels = torch.arange(len(classes), device="cpu")
    return Episode(
        class_names=[entry.words for entry in classes],
        support_images=images.preprocess.normalise(support_pixels),
        support_labels=labels.repeat_interleave(shots * views_per_image(augment)),
        query_images=query_images,
        index=plan.index,
        query_labels=labels.repeat_interleave(torch.tensor(query_counts, device="cpu")),
        folders=tuple(entry.folder for entry in classes),
        skipped=tuple(itertools.chain(*drawing.skipped)),
        shots=shots,
    )


class _Drawing:
    """Reads an episode's images in drawing order, past those that can't be read.

    Args:
        plan: Plan of the episode.
        data: Data that it draws from.
        images: Reader of the images.
        shots, queries: Images per class; ``None`` for all queries.

    Attributes:
        skipped: Per class, the names of the images that could not be read.
    """

    def __init__(
        self,
        plan: EpisodePlan,
        data: ImageData,
        images: ImageReader,
        shots: int,
        queries: int | None,
    ) -> None:
        if bool(data.queries) != bool(plan.query_orders):
            raise ValueError("plan must have query_orders for data with a part for queries")
        self._name, self._images = data.name, images
        self._shots, self._queries = shots, queries
        self._support = [data.classes[c] for c in plan.classes]
        self._asked = [(data.queries or data.classes)[c] for c in plan.classes]
        support_orders = [iter(order) for order in plan.orders]
        # Without a part of their own, queries are what the support leaves.
        self._orders = {
            "support": support_orders,
            "queries": [iter(order) for order in plan.query_orders] or support_orders,
        }
        self._support_groups: set[str] = set()
        most = sum(len(e.files) if queries is None else queries for e in self._asked)
        self._holds_queries = most * math.prod(images.preprocess.shape) <= _HELD_BYTES
        self.skipped: list[list[str]] = [[] for _ in plan.classes]
        self._read = self._expected(plan)

    def support(self, c: int) -> list[Tensor]:
        """The support images of a class, (3, H, W) each; to be asked for before any queries."""
        entry = self._support[c]
        readable = self._readable(c, entry, self._orders["support"][c])
        found = list(itertools.islice(readable, self._shots))
        self._require(c, len(found), self._shots)
        self._support_groups.update(entry.groups[position] for position, _ in found if entry.groups)
        return [image for _, image in found]

    def queries(self, device: str | torch.device) -> tuple[list[int], Images]:
        """The number of query images of each class, and all of these images, normalised.

        They are of other groups than the support of all classes.
        """
        if not self._holds_queries:
            positions = [self._readable_queries(c) for c in range(len(self._asked))]
            wanted = [
                (entry, position)
                for entry, own in zip(self._asked, positions, strict=True)
                for position in own
            ]
            return list(map(len, positions)), QueryImages(self._images, wanted, device)
        found = []
        for c, entry in enumerate(self._asked):
            readable = self._readable(c, entry, self._left(c))
            found.append([image for _, image in itertools.islice(readable, self._queries)])
            self._require_queries(c, len(found[-1]))
        pixels = torch.stack(list(itertools.chain(*found))).to(device)
        return list(map(len, found)), self._images.preprocess.normalise(pixels)

    def _left(self, c: int) -> Iterator[int]:
        """The images of a class that may be queries, in drawing order; where all are, in theirs."""
        order = self._orders["queries"][c]
        return _without(
            self._asked[c], sorted(order) if self._queries is None else order, self._support_groups
        )

    def _readable_queries(self, c: int) -> list[int]:
        """The positions of a class's queries, none of whose images is kept in memory."""
        entry, left = self._asked[c], self._left(c)
        found: list[int] = []
        while self._queries is None or len(found) < self._queries:
            missing = None if self._queries is None else self._queries - len(found)
            some = list(itertools.islice(left, missing))
            if not some:
                break
            flags = self._images.check_many([(entry, position) for position in some])
            for position, is_readable in zip(some, flags, strict=True):
                if is_readable:
                    found.append(position)
                else:
                    self.skipped[c].append(entry.files[position])
        self._require_queries(c, len(found))
        return found

    def _require_queries(self, c: int, found: int) -> None:
        self._require(c, self._shots + found, self._shots + (self._queries or 1))

    def _readable(
        self, c: int, entry: ImageClass, positions: Iterable[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Those of some images of a class that can be read, with their positions."""
        for position in positions:
            name = entry.files[position]
            image = (
                self._read.pop(name) if name in self._read else self._images.read(entry, position)
            )
            if image is None:
                self.skipped[c].append(name)
            else:
                yield position, image

    def _expected(self, plan: EpisodePlan) -> dict[str, Tensor | None]:
        """All that are needed if all are readable, at once, so they are decoded side by side."""
        support = [order[: self._shots] for order in plan.orders]
        groups = {
            entry.groups[position]
            for entry, positions in zip(self._support, support, strict=True)
            for position in positions
            if entry.groups
        }
        asked = plan.query_orders or [order[self._shots :] for order in plan.orders]
        wanted: list[tuple[ImageClass, int]] = []
        for c, positions in enumerate(support):
            wanted += [(self._support[c], position) for position in positions]
            if not self._holds_queries:
                continue
            others = _without(self._asked[c], asked[c], groups)
            wanted += [(self._asked[c], each) for each in itertools.islice(others, self._queries)]
        found = self._images.read_many(wanted)
        names = [entry.files[position] for entry, position in wanted]
        return dict(zip(names, found, strict=True))

    def _require(self, c: int, found: int, needed: int) -> None:
        if found >= needed:
            return
        entry = self._support[c]
        others = " of other subjects than its support" if entry.groups else ""
        raise FewShotError(
            f"class {entry.folder!r} in {self._name} has {found} readable images but "
            f"{self._shots + (self._queries or 1)}{others} are needed "
            f"({sizes_in_words(self._shots, self._queries)}); add images, or lower "
            f"{lower_sizes(self._queries)}"
        )


def _without(entry: ImageClass, positions: Iterable[int], groups: Set[str]) -> Iterator[int]:
    """Those of some images of a class that are of none of these groups."""
    return (each for each in positions if not entry.groups or entry.groups[each] not in groups)
