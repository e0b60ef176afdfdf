"""Reading the images of an episode."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageData
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
                f"add images, or lower {setting('shots')} or {setting('queries')}"
            )
        support += readable[:shots]
        query += readable[shots:]
    support_pixels, query_pixels = (torch.stack(each).to(device) for each in (support, query))
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
        skipped=tuple(skipped),
        shots=shots,
    )
