"""CKA: how alike a block's class tokens are to those of the first pass, and of the last block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tir_kernels.analysis.measures.first_sight import FirstSight
from tir_kernels.analysis.measures.protocol import BlockView, Finding
from tir_kernels.analysis.measures.representations import representations
from tir_kernels.analysis.similarity import linear_cka


@dataclass
class Cka:
    """Unbiased linear CKA of what stands for an image in each block (arXiv 2010.15327).

    That is the class token which leaves the block, or the mean patch of towers without one. It is
    compared with the same block's in the first pass, and with the last block's in the same pass;
    the latter come all at once, with the last block. The value belongs to a group of images, not to
    one, and stands for each of them; :func:`tir_kernels.analysis.linear_cka` compares arms.

    Chance: 0, as of images that are paired at random. None is found for groups of less than four
    images, which have no unbiased estimate, or of images that are all the same to the block.
    """

    name = "cka"

    _first: FirstSight = field(default_factory=FirstSight, init=False, repr=False)
    _pass: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        if view.block == 0:
            self._pass.clear()
        found = representations(view)
        features = next(iter(found.values())).clone()
        first = self._first.of(view.block, features)
        values = _by_group(features, first, view.num_groups)
        yield Finding("CKA with the first pass", view.block, values, 0.0)
        self._pass[view.block] = features
        if view.block == view.num_blocks - 1:
            for block, own in self._pass.items():
                values = _by_group(own, features, view.num_groups)
                yield Finding("CKA with the last block", block, values, 0.0)
            self._pass.clear()


def _by_group(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """(B, D), (B, D) -> (B,)."""
    size = len(first) // groups
    pairs = zip(first.view(groups, size, -1), second.view(groups, size, -1), strict=True)
    values = torch.tensor([linear_cka(own, its) for own, its in pairs], dtype=torch.float32)
    return values.repeat_interleave(size).to(first.device)
