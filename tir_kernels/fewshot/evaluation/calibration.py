"""Calibration: whether answers given with confidence p are right in a share p of the cases."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 15


class Bin(NamedTuple):
    """The images whose confidence lies in (low, high].

    Attributes:
        low, high: Its ends.
        images: Number of images.
        confidence, accuracy: Their means; ``None`` without images.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


class Calibration(NamedTuple):
    """Calibration of the largest probability of each image.

    Attributes:
        error: Expected calibration error, from 0 to 1.
        bins: Bins of equal width, from low to high.
    """

    error: float
    bins: tuple[Bin, ...]


def calibration(
    confidences: NDArray[np.float64], is_right: NDArray[np.bool_], bins: int = BINS
) -> Calibration:
    """The expected calibration error and its bins.

    The mean over images of \\|accuracy - confidence\\| of their bin, with 15 bins of equal width
    unless set: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 3. With
    few images it is too large, since the accuracy of a bin is then a matter of chance.

    Args:
        confidences: (N,) largest probability of each image, in (0, 1].
        is_right: (N,) whether its class is the image's.
        bins: Number of bins.
    """
    edges = np.linspace(0, 1, bins + 1)
    places = np.digitize(confidences, edges[1:-1], right=True)
    found, error = [], 0.0
    for place in range(bins):
        mask = places == place
        ends, count = (float(edges[place]), float(edges[place + 1])), int(mask.sum())
        if not count:
            found.append(Bin(*ends, 0, None, None))
            continue
        confidence, accuracy = float(confidences[mask].mean()), float(is_right[mask].mean())
        found.append(Bin(*ends, count, confidence, accuracy))
        error += count / len(confidences) * abs(accuracy - confidence)
    return Calibration(error, tuple(found))
