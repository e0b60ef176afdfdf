"""Norms by count: the mean norm of patches that 0, 1, …, C classes select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tir_kernels.analysis.measures.first_sight import FirstSight
from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass
class NormsByCount:
    """Mean norm of the patches that enter a block, for each count 0 … C (arXiv 2605.25799).

    A count is made of the very tokens whose norm is asked for, so that it changes with them. Hence
    each norm stands twice: with the counts of the first pass, kept block by block ("first"), and
    with those of this pass ("present"). Chance: the mean norm of all the image's patches, as of a
    count that has nothing to do with norms. None is found in an image where no patch has the count,
    or without classes.
    """

    name = "norms-by-count"

    _first: FirstSight = field(default_factory=FirstSight, init=False, repr=False)

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        if not view.num_classes:
            return
        norms = view.hidden[:, view.num_prefix_tokens :].float().norm(dim=2)  # (B, N)
        everywhere = norms.mean(1)
        sets = {"first": self._first.of(view.block, view.counts), "present": view.counts}
        for age, counts in sets.items():
            for count in range(view.num_classes + 1):
                values = mean_over(counts == count, norms)
                yield Finding(f"norm at {age} count {count}", view.block, values, everywhere)


def mean_over(chosen: Tensor, values: Tensor) -> Tensor:
    """(B, N) bool, (B, N) -> (B,) mean of the chosen values; NaN where none is chosen."""
    return torch.where(chosen, values, 0.0).sum(1) / chosen.sum(1)
