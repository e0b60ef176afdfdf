"""Selection overlap: how alike the sets of patches are that the classes select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass(frozen=True)
class SelectionOverlap:
    """Mean Jaccard index of the patches that two classes select, over all pairs of classes.

    ``|S ∩ T| / |S ∪ T|``, each set being a class's most relevant patches (arXiv 2605.25799): 1
    where all classes look at the same ones. Chance: k / (2 − k) for independent sets that hold the
    share k of all patches. None is found with one class, or where classes select nothing.
    """

    name = "selection-overlap"

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        if not view.num_classes:
            return
        name, selected = "overlap of selected patches", view.selected.float()  # (B, C, N)
        batch, num_classes, count = selected.shape
        size = int(count * view.top_ratio)
        if num_classes < 2 or size == 0:
            yield Finding(name, view.block, selected.new_full((batch,), torch.nan), torch.nan)
            return
        shared = selected @ selected.mT  # (B, C, C)
        pairs = torch.ones_like(shared[0], dtype=torch.bool).triu(1)
        jaccard = shared / (2 * size - shared)
        share = size / count
        yield Finding(name, view.block, jaccard[:, pairs].mean(1), share / (2 - share))
