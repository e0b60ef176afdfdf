"""The seam between measures and towers: what a measure sees of a block, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tir_kernels.analysis.measures.block_view import BlockView

__all__ = ["Average", "BlockView", "Finding", "Measure"]


class Average(NamedTuple):
    """A finding's mean over some images, or ``None`` where none of them has such a thing."""

    value: float | None
    chance: float | None


class Finding(NamedTuple):
    """A number for each image, in one block.

    A quantity of a whole set of images, such as the separability of its classes, is repeated for
    each image of the set, so that every mean is the set's number.

    Attributes:
        name: Quantity, with what tells it from the measure's others.
        block: Number of the block.
        values: (B,) float32; NaN: none found, because the image has no such token, say.
        chance: The value under uniform attention, random labels or the like, as the measure says:
            one for all images, or (B,).
    """

    name: str
    block: int
    values: Tensor
    chance: float | Tensor

    def averages(self, num_groups: int = 1) -> list[Average]:
        """Means over the images of each group, in which the batch falls; NaN does not count.

        The chance level is that of the images in which something was found, if there are any.
        """
        values = self.values.float().cpu()
        chance = torch.as_tensor(self.chance, dtype=torch.float32, device="cpu").expand_as(values)
        pairs = zip(values.view(num_groups, -1), chance.reshape(num_groups, -1), strict=True)
        return [_average(own, own_chance) for own, own_chance in pairs]


def _average(values: Tensor, chance: Tensor) -> Average:
    is_found = ~values.isnan()
    return Average(_mean(values), _mean(chance[is_found] if is_found.any() else chance))


def _mean(values: Tensor) -> float | None:
    mean = values.nanmean().item()
    return None if mean != mean else mean


class Measure(Protocol):
    """A measure of blocks; its fields, if any, are its settings.

    A measure may keep what it saw first in each block, to compare later passes with it: so make one
    anew for each model and set of images, and give it the same images, in the same order, in each
    pass, block after block. One that lacks what it needs (classes, labels) finds nothing.

    Attributes:
        name: Name in the registry.
    """

    name: str

    def of_block(self, view: BlockView) -> Iterable[Finding]:
        """The measure's findings in one block, without gradients."""
