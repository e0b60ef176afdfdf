"""Medians, and what to expect of the largest of many numbers."""

from __future__ import annotations

from torch import Tensor


def median(values: Tensor) -> Tensor:
    """The median over the last dimension, of as many values as there may be: (..., n) -> (...).

    The mean of the two middle ones where n is even, as NumPy's; PyTorch's takes the lower one.
    """
    count = values.shape[-1]
    upper = values.kthvalue(count // 2 + 1).values
    return upper if count % 2 else (upper + values.kthvalue(count // 2).values) / 2


def rank_of_largest(count: int) -> float:
    """The quantile of a distribution below which the largest of ``count`` draws falls half the
    time."""
    return 0.5 ** (1 / count)
