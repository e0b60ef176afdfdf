"""Separability: how far apart the classes of images lie in a block's representation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tir_kernels.analysis.measures.protocol import BlockView, Finding
from tir_kernels.analysis.measures.representations import representations

_KINDS = ("scatter ratio", "silhouette")


@dataclass(frozen=True)
class Separability:
    """Scatter between classes over scatter within, and silhouette by cosine, of images.

    ``J = tr S_B / tr S_W`` is scikit-learn's ``calinski_harabasz_score · (C − 1) / (n − C)`` of n
    images, and depends on n: compare equal numbers. Both are of the class token that leaves the
    block, and of the mean of the patches. They belong to a group of images, not to one, and stand
    for each of them.

    Chance: the mean over random permutations of the labels, the same ones each time. None is found
    without labels, with one class, with as many classes as images (one shot), or without scatter.

    Args:
        permutations: How many.
    """

    name = "separability"

    permutations: int = 100

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        if view.labels is None:
            return
        groups = view.num_groups
        labels = view.labels.cpu().view(groups, -1)
        for source, features in representations(view).items():
            parts = features.cpu().double().view(groups, labels.shape[1], -1)
            found = [
                separability(own, each, self.permutations)
                for own, each in zip(parts, labels, strict=True)
            ]
            # (2, 2, B): a value and its chance level, of two kinds
            spread = torch.stack(found, -1).float().repeat_interleave(labels.shape[1], -1)
            spread = spread.to(features.device)
            for kind, (values, chance) in zip(_KINDS, spread, strict=True):
                yield Finding(f"{kind} of {source}", view.block, values, chance)


def separability(features: Tensor, labels: Tensor, permutations: int = 100) -> Tensor:
    """Scatter ratio and silhouette of a set of images, each with its mean under random labels.

    All labellings are treated at once, which scikit-learn's scores do not do; they agree with it.

    Args:
        features: (n, D).
        labels: (n,), whole numbers.
        permutations: How many labellings give the chance level.

    Returns:
        (2, 2) float64 on the CPU, rows: scatter ratio, silhouette; columns: value, chance. NaN:
        none found.
    """
    features = features.detach().cpu().double()
    classes, labels = labels.cpu().unique(return_inverse=True)
    count = len(labels)
    if not 2 <= len(classes) < count:
        return torch.full((2, 2), torch.nan, dtype=torch.float64)
    random = np.random.default_rng(0)  # the same permutations whatever else is computed
    orders = [np.arange(count), *(random.permutation(count) for _ in range(permutations))]
    members = F.one_hot(labels[torch.from_numpy(np.stack(orders))]).double()  # (R, n, C)
    found = torch.stack([_scatter_ratio(features, members), _silhouette(features, members)])
    return torch.stack([found[:, 0], found[:, 1:].nanmean(1)], 1)


def _scatter_ratio(features: Tensor, members: Tensor) -> Tensor:
    """(n, D), (R, n, C) -> (R,)."""
    centred = features - features.mean(0)
    gram = centred @ centred.T
    between = ((members * (gram @ members)).sum(1) / members.sum(1)).sum(1)
    within = gram.trace() - between
    has_scatter = within > 1e-12 * gram.trace()
    return torch.where(has_scatter, between / within, torch.nan)


def _silhouette(features: Tensor, members: Tensor) -> Tensor:
    """(n, D), (R, n, C) -> (R,), with 0 for an image that is alone in its class."""
    directions = F.normalize(features, dim=1)
    distances = (1 - directions @ directions.T).clamp(min=0).fill_diagonal_(0)
    sums, sizes = distances @ members, members.sum(1, keepdim=True)  # (R, n, C), (R, 1, C)
    own_size = (members * sizes).sum(2)
    own = (members * sums).sum(2) / (own_size - 1)
    nearest = (sums / sizes).masked_fill(members.bool(), torch.inf).amin(2)
    scores = (nearest - own) / torch.maximum(nearest, own)
    return torch.where(own_size > 1, scores.nan_to_num(0.0), 0.0).mean(1)
