"""Patches that are taken for attention sinks, without any text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tir_kernels.adapters.selection import PatchOrder
from tir_kernels.towers.protocol import Block

# Of a normal distribution, in units of the median of the absolute deviations.
_STANDARD_DEVIATION = 1.4826


class Sinks(Protocol):
    """A choice of each image's sinks in a block."""

    def __call__(self, block: Block, layer: int, hidden: Tensor, num_prefix_tokens: int) -> Tensor:
        """(B, N) bool, which patches are sinks; the arguments are those of ``PatchOrder``."""
        ...


class FirstOf:
    """The first patches of an order: the most attended ones, say, or as many at random.

    Args:
        order: Order of the patches.
        count: How many; all of them where an image has fewer.
    """

    def __init__(self, order: PatchOrder, count: int) -> None:
        self.order = order
        self.count = count

    def __call__(self, block: Block, layer: int, hidden: Tensor, num_prefix_tokens: int) -> Tensor:
        order = self.order(block, layer, hidden, num_prefix_tokens)
        chosen = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
        return chosen.scatter_(1, order[:, : self.count], True)


class NormOutliers:
    """Patches whose norm, as they enter the block, stands out of their image's.

    Args:
        cut: The norm above which a patch stands out; ``None``: as in :func:`norm_outliers`.
    """

    def __init__(self, cut: float | None = None) -> None:
        self.cut = cut

    def __call__(self, block: Block, layer: int, hidden: Tensor, num_prefix_tokens: int) -> Tensor:
        return norm_outliers(hidden[:, num_prefix_tokens:], self.cut)


def norm_outliers(patches: Tensor, cut: float | None = None) -> Tensor:
    """Which tokens have a norm that stands out of their image's.

    Args:
        patches: (B, N, D).
        cut: The norm above which a token does; ``None``: the median of the image's norms and six
            standard deviations, these taken from the median absolute deviation.

    Returns:
        (B, N) bool.
    """
    norms = patches.float().norm(dim=-1)
    if cut is not None:
        return norms > cut
    median = norms.quantile(0.5, dim=1, keepdim=True)
    deviation = (norms - median).abs().quantile(0.5, dim=1, keepdim=True)
    return norms > median + 6 * _STANDARD_DEVIATION * deviation


def above_quartiles(values: Tensor) -> Tensor:
    """Which of each row's values (B, N) lie above Q3 + 1.5 (Q3 - Q1), as (B, N) bool."""
    levels = torch.tensor([0.25, 0.75], device=values.device)
    first, third = values.float().quantile(levels, dim=1)[..., None]
    return values > third + 1.5 * (third - first)
