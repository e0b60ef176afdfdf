"""Bootstrap intervals of scores, over images or over groups of images."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_NUMBERS_AT_ONCE = 2**20  # 8 MiB in float64


class Answers(NamedTuple):
    """What the images are, and what a classifier says they are.

    Attributes:
        labels, predicted: (N,) int64 classes, of C.
        losses: (N,) float64 log loss of each.
        among_first: (N,) bool, whether the label is among the three classes of most probability.
        classes: C.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    losses: NDArray[np.float64]
    among_first: NDArray[np.bool_]
    classes: int


def bootstrap_intervals(
    answers: Answers, groups: NDArray[np.int64] | None, resamples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the scores, by resampling images or whole groups.

    Images of one group, such as a patient, are alike: an interval over images would be too narrow
    for other patients. A class that a resample lacks is left out of its means over classes.

    Args:
        answers: The answers.
        groups: (N,) group of each image, from 0 on; ``None``: each is its own.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        "accuracy", "balanced_accuracy", "macro_f1", "log_loss" and "top3_accuracy" -> ends; nothing
        where there are fewer than two groups.
    """
    # Here, since they take seconds to import, which nothing else needs to wait for.
    from scipy import sparse, stats

    count, classes = len(answers.labels), answers.classes
    units = np.arange(count) if groups is None else groups
    number = int(units.max()) + 1
    if number < 2:
        return {}
    is_right = answers.labels == answers.predicted
    rows = np.concatenate([units, units, units[is_right]])
    places = np.concatenate(
        [answers.labels, classes + answers.predicted, 2 * classes + answers.labels[is_right]]
    )
    ones = np.ones(len(rows))
    counts = sparse.csr_array((ones, (rows, places)), shape=(number, 3 * classes))
    sums = np.stack([answers.losses, answers.among_first], axis=1)
    totals = np.zeros((number, 2))
    np.add.at(totals, units, sums)

    def scores(index: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        """(..., units) drawn units -> (5, ...) scores."""
        drawn = index.reshape(-1, number)
        # How often each unit was drawn: all scores follow from sums over units.
        offset = drawn + number * np.arange(len(drawn))[:, None]
        times = np.bincount(offset.ravel(), minlength=drawn.size).reshape(drawn.shape)
        # The transpose, since a sparse array is to stand on the left.
        table = (counts.T @ times.T).T.reshape(len(drawn), 3, classes)
        of_class, said, right = table[:, 0], table[:, 1], table[:, 2]
        images = of_class.sum(1)
        found = [
            right.sum(1) / images,
            _mean_of_present(right, of_class, of_class),
            _mean_of_present(2 * right, of_class + said, of_class),
            *(times @ totals / images[:, None]).T,
        ]
        return np.stack(found).reshape(len(found), *index.shape[:-1])

    with warnings.catch_warnings():
        # A score that is the same in all resamples has an interval of no width, as its caller says.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (np.arange(number),),
            scores,
            n_resamples=resamples,
            batch=max(1, _NUMBERS_AT_ONCE // (number + 6 * classes)),
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            random_state=np.random.default_rng(seed),
        )
    names = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "top3_accuracy")
    low, high = result.confidence_interval
    return {name: (float(low[at]), float(high[at])) for at, name in enumerate(names)}


def _mean_of_present(
    numerators: NDArray[np.float64],
    denominators: NDArray[np.float64],
    present: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(B, C) fractions -> (B,) their means over the classes that a resample has."""
    fractions = np.divide(
        numerators, denominators, out=np.full(present.shape, np.nan), where=present > 0
    )
    return np.nanmean(fractions, axis=1)
