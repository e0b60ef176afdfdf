"""Reading the images of an episode."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Set

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.views import with_views
from tir_kernels.fewshot.episode import Episode, EpisodePlan, random_state
from tir_kernels.text import setting


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
        plan: Plan of the episode.
        data: Data that it draws from.
        images: Reader of the images.
        shots: Support images per class.
        queries: Query images per class.
        device: Device on which the images are normalised and augmented, and left; labels stay on
            the CPU.
        augment: Augmented views of each support image, see ``draw_views``.
        seed: Seed of the run, which decides the views together with the episode's number.

    Raises:
        FewShotError: An image can't be read, or too few of a class can.
    """
    classes = [data.classes[c] for c in plan.classes]
    drawing = _Drawing(plan, data, images, shots, queries)
    support = [drawing.support(c) for c in range(len(classes))]
    query = [drawing.queries(c) for c in range(len(classes))]
    support_pixels, query_pixels = (
        torch.stack(list(itertools.chain(*each))).to(device) for each in (support, query)
    )
    if augment:
        support_pixels = with_views(
            support_pixels, augment, random_state(seed, plan.index, stream=2)
        )
    labels = torch.arange(len(classes), device="cpu")
    return Episode(
        class_names=[entry.words for entry in classes],
        support_images=images.preprocess.normalise(support_pixels),
        support_labels=labels.repeat_interleave(shots * (1 + augment)),
        query_images=images.preprocess.normalise(query_pixels),
        index=plan.index,
        query_labels=labels.repeat_interleave(queries),
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
        shots, queries: Images per class.

    Attributes:
        skipped: Per class, the names of the images that could not be read.
    """

    def __init__(
        self, plan: EpisodePlan, data: ImageData, images: ImageReader, shots: int, queries: int
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

    def queries(self, c: int) -> list[Tensor]:
        """The query images of a class, of other groups than the support of all classes."""
        entry = self._asked[c]
        left = _without(entry, self._orders["queries"][c], self._support_groups)
        found = list(itertools.islice(self._readable(c, entry, left), self._queries))
        self._require(c, self._shots + len(found), self._shots + self._queries)
        return [image for _, image in found]

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
            f"{self._shots + self._queries}{others} are needed ({self._shots} shots + "
            f"{self._queries} queries); add images, or lower {setting('shots')} or "
            f"{setting('queries')}"
        )


def _without(entry: ImageClass, positions: Iterable[int], groups: Set[str]) -> Iterator[int]:
    """Those of some images of a class that are of none of these groups."""
    return (each for each in positions if not entry.groups or entry.groups[each] not in groups)
