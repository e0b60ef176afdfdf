"""Reading the images of an episode."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set

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
    drawing = _Drawing(data.name, classes, plan.orders, images, shots, queries)
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
        name: Name of the data, for messages.
        classes: Classes of the episode.
        orders: Per class, all its images in drawing order.
        images: Reader of the images.
        shots, queries: Images per class.

    Attributes:
        skipped: Per class, the names of the images that could not be read.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[ImageClass],
        orders: Sequence[Sequence[int]],
        images: ImageReader,
        shots: int,
        queries: int,
    ) -> None:
        self._name, self._classes, self._images = name, classes, images
        self._shots, self._queries = shots, queries
        self._waiting = [iter(order) for order in orders]
        self._support_groups: set[str] = set()
        self.skipped: list[list[str]] = [[] for _ in classes]
        self._read = self._expected(orders)

    def support(self, c: int) -> list[Tensor]:
        """The support images of a class, (3, H, W) each; to be asked for before any queries."""
        found = list(itertools.islice(self._readable(c), self._shots))
        self._require(c, len(found), self._shots)
        groups = self._classes[c].groups
        self._support_groups.update(groups[position] for position, _ in found if groups)
        return [image for _, image in found]

    def queries(self, c: int) -> list[Tensor]:
        """The query images of a class, of other groups than the support of all classes."""
        readable = self._readable(c, self._support_groups)
        found = list(itertools.islice(readable, self._queries))
        self._require(c, self._shots + len(found), self._shots + self._queries)
        return [image for _, image in found]

    def _readable(self, c: int, without: Set[str] = frozenset()) -> Iterator[tuple[int, Tensor]]:
        """The images of a class that are left, but for those of some groups."""
        entry = self._classes[c]
        for position in self._waiting[c]:
            if entry.groups and entry.groups[position] in without:
                continue
            if (c, position) in self._read:
                image = self._read.pop((c, position))
            else:
                image = self._images.read(entry, position)
            if image is None:
                self.skipped[c].append(entry.files[position])
            else:
                yield position, image

    def _expected(self, orders: Sequence[Sequence[int]]) -> dict[tuple[int, int], Tensor | None]:
        """All that are needed if all are readable, at once, so they are decoded side by side."""
        support_groups = {
            entry.groups[position]
            for entry, order in zip(self._classes, orders, strict=True)
            for position in order[: self._shots]
            if entry.groups
        }
        wanted = []
        for c, (entry, order) in enumerate(zip(self._classes, orders, strict=True)):
            wanted += [(c, position) for position in order[: self._shots]]
            others = (
                position
                for position in order[self._shots :]
                if not entry.groups or entry.groups[position] not in support_groups
            )
            wanted += [(c, position) for position in itertools.islice(others, self._queries)]
        found = self._images.read_many([(self._classes[c], position) for c, position in wanted])
        return dict(zip(wanted, found, strict=True))

    def _require(self, c: int, found: int, needed: int) -> None:
        if found >= needed:
            return
        entry = self._classes[c]
        others = " of other subjects than its support" if entry.groups else ""
        raise FewShotError(
            f"class {entry.folder!r} in {self._name} has {found} readable images but "
            f"{self._shots + self._queries}{others} are needed ({self._shots} shots + "
            f"{self._queries} queries); add images, or lower {setting('shots')} or "
            f"{setting('queries')}"
        )
