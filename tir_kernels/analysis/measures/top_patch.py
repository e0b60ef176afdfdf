"""Top patch: where the patch lies that receives most attention, and whether it stays there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tir_kernels.analysis.measures.first_sight import FirstSight
from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass
class TopPatch:
    """Place of the patch that receives most attention, as a mean over heads and all queries.

    - On the border of the image: 1 or 0 for each, chance: the border's share of the patches.
      Sinks at fixed places were reported for some towers (arXiv 2604.09547). Patches are taken to
      lie in a square; none is found where their number is no square.
    - The same as at first sight: 1 or 0, chance 1/N; 1 in the first pass.
    - The same as in other images: the share of the group's other images whose top patch has the
      same place, chance 1/N; none is found for one image.
    """

    name = "top-patch"

    _first: FirstSight = field(default_factory=FirstSight, init=False, repr=False)

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        patches = view.received.mean(1)[:, view.num_prefix_tokens :]  # (B, N)
        batch, count = patches.shape
        if count == 0:
            return
        top = patches.argmax(1)  # the lower index where two are equal
        yield Finding("top patch is on the border", view.block, *_border(top, count))
        is_same = (top == self._first.of(view.block, top)).float()
        yield Finding("top patch is where it was first", view.block, is_same, 1 / count)
        groups = top.view(view.num_groups, -1)
        others = groups.shape[1] - 1
        agreeing = (groups[:, :, None] == groups[:, None]).sum(2).float() - 1
        agreement = agreeing / others if others else torch.full_like(agreeing, torch.nan)
        name = "top patch is where it is in other images"
        yield Finding(name, view.block, agreement.view(batch), 1 / count)


def _border(top: Tensor, count: int) -> tuple[Tensor, float]:
    side = math.isqrt(count)
    if side * side != count:
        return torch.full_like(top, torch.nan, dtype=torch.float32), math.nan
    row, column = top // side, top % side
    is_border = (row == 0) | (row == side - 1) | (column == 0) | (column == side - 1)
    return is_border.float(), 1 - max(side - 2, 0) ** 2 / count
