"""Linear CKA: how alike two representations of the same images are."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

FEWEST = 4  # rows that the unbiased estimate needs


def linear_cka(first: ArrayLike, second: ArrayLike, batch_size: int | None = None) -> float:
    """Linear centred kernel alignment of two feature matrices (arXiv 1905.00414), unbiased.

    Row i of one belongs to row i of the other: the same image in two blocks, or under two arms. Of
    two sets of *different* images, such as a source and a target domain, rows are paired as the
    caller pairs them, by class say; without a reason behind the pairs the value is that of chance.
    :func:`permutation_null` says what chance gives.

    HSIC is estimated without bias in each minibatch and summed over them before the ratio is taken
    (arXiv 2010.15327), so that few images are no handicap and 0 means unrelated; a value may be
    slightly below 0.

    Args:
        first, second: (n, D) and (n, E), tensors or arrays of any floating type.
        batch_size: Rows of a minibatch at most, at least 4; ``None``: all at once.

    Returns:
        The alignment: 1 for features that are the same but for rotation, scale and shift, about 0
        for unrelated ones; NaN, none found: fewer than 4 rows, or features without variation.

    Raises:
        ValueError: Other shapes, or a batch size below 4.
    """
    one, other = _matrix("first", first), _matrix("second", second)
    if len(one) != len(other):
        raise ValueError(
            f"first and second must have as many rows, which are pairs; got {len(one)} and "
            f"{len(other)}"
        )
    if batch_size is not None and batch_size < FEWEST:
        raise ValueError(f"batch_size must be at least {FEWEST}; got {batch_size}")
    count = len(one)
    if count < FEWEST:
        return float("nan")
    # Equal parts, so that the last is not too small; where that cannot be, parts are larger.
    parts = 1 if batch_size is None else min(-(-count // batch_size), count // FEWEST)
    sums = torch.zeros(3, dtype=torch.float64)
    for own, its in zip(one.tensor_split(parts), other.tensor_split(parts), strict=True):
        grams = _gram(own), _gram(its)
        sums += torch.stack([_hsic(*grams), _hsic(grams[0], grams[0]), _hsic(grams[1], grams[1])])
    return _ratio(sums)


def permutation_null(
    first: ArrayLike, second: ArrayLike, permutations: int = 100, seed: int = 0
) -> Tensor:
    """Linear CKA of randomly paired rows, (permutations,) float64: what chance gives, about 0.

    Args:
        first, second: As for :func:`linear_cka`.
        permutations: How many pairings.
        seed: Of the pairings, which depend on nothing else.
    """
    random = np.random.default_rng(seed)
    one, other = _matrix("first", first), _matrix("second", second)
    orders = (torch.from_numpy(random.permutation(len(other))) for _ in range(permutations))
    return torch.tensor([linear_cka(one, other[order]) for order in orders], dtype=torch.float64)


def _matrix(name: str, features: ArrayLike) -> Tensor:
    matrix = torch.as_tensor(features).detach().cpu().double()
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have shape (n, D); got {tuple(matrix.shape)}")
    return matrix


def _gram(features: Tensor) -> Tensor:
    """Products of all pairs of rows, (n, n); centred, which the estimate does not notice, so that a
    mean far from 0 costs no digits."""
    centred = features - features.mean(0)
    if centred.norm() <= 1e-12 * features.norm():  # nothing but rounding is left
        centred = torch.zeros_like(centred)
    return (centred @ centred.T).fill_diagonal_(0)


def _hsic(first: Tensor, second: Tensor) -> Tensor:
    """Unbiased estimate from Gram matrices (n, n) without their diagonals."""
    count = len(first)
    total = first.sum() * second.sum() / ((count - 1) * (count - 2))
    cross = first.sum(0) @ second.sum(0) * 2 / (count - 2)
    return ((first * second).sum() + total - cross) / (count * (count - 3))


def _ratio(sums: Tensor) -> float:
    shared, first, second = sums.tolist()
    if not (first > 0 and second > 0):
        return float("nan")
    return shared / (first * second) ** 0.5
