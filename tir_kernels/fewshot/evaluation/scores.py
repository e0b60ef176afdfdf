"""The scores of a classifier from its logits and the images' labels, by scikit-learn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tir_kernels.fewshot.evaluation.calibration import Calibration, calibration
from tir_kernels.fewshot.evaluation.intervals import Answers, bootstrap_intervals

FIRST = 3  # classes of most probability, for the accuracy among these


class Score(NamedTuple):
    """A number with its interval.

    Attributes:
        value: The number.
        low, high: Ends of the 95 % interval; ``None`` where there is none.
    """

    value: float
    low: float | None = None
    high: float | None = None


class ClassScores(NamedTuple):
    """The scores of one class.

    Attributes:
        label: Its name in the classifier.
        images: Evaluated images of it.
        precision: Share of the images called so that are of it; ``None`` where none is called so.
        recall, f1: ``None`` without images of it.
    """

    label: str
    images: int
    precision: float | None
    recall: float | None
    f1: float | None


class Scores(NamedTuple):
    """All scores.

    Attributes:
        scores: Name -> score: "accuracy"; "balanced_accuracy" and "macro_f1", means over the
            classes that have images; "log_loss"; and with more than three classes "top3_accuracy".
        classes: Those of each class, in the order of the logits.
        confusion: (C, C) int64: [true class, class that was said] -> images.
        calibration: Calibration of the largest probability.
        probabilities: (N, C) float64.
    """

    scores: dict[str, Score]
    classes: tuple[ClassScores, ...]
    confusion: NDArray[np.int64]
    calibration: Calibration
    probabilities: NDArray[np.float64]


def compute_scores(
    logits: NDArray[np.float32],
    targets: NDArray[np.int64],
    labels: tuple[str, ...],
    temperature: float,
    *,
    groups: NDArray[np.int64] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Scores:
    """The scores of a classifier.

    Args:
        logits: (N, C), N at least 1.
        targets: (N,) class of each image.
        labels: The classes' names.
        temperature: Divisor of the logits.
        groups: (N,) group of each image, from 0 on, over which intervals are taken.
        resamples: Resamples for the intervals; 0: no intervals.
        seed: Seed of the resamples.
    """
    # Here, since they take seconds to import, which nothing else needs to wait for.
    from scipy.special import softmax
    from sklearn import metrics

    every = np.arange(len(labels))
    probabilities = softmax(logits.astype(np.float64) / temperature, axis=1)
    predicted = logits.argmax(1)
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        targets, predicted, labels=every, zero_division=np.nan
    )
    present = images > 0
    values = {
        "accuracy": metrics.accuracy_score(targets, predicted),
        "balanced_accuracy": recall[present].mean(),
        "macro_f1": f1[present].mean(),
        "log_loss": metrics.log_loss(targets, probabilities, labels=every),
    }
    if len(labels) > FIRST:
        values["top3_accuracy"] = metrics.top_k_accuracy_score(
            *_first_wins(targets, logits), k=FIRST, labels=every
        )
    intervals = {}
    if resamples:
        answers = _answers(logits, probabilities, targets, predicted)
        intervals = bootstrap_intervals(answers, groups, resamples, seed)
    return Scores(
        {
            name: Score(float(value), *intervals.get(name, (None, None)))
            for name, value in values.items()
        },
        tuple(
            ClassScores(
                label,
                int(images[at]),
                _number(precision[at]),
                _number(recall[at]) if present[at] else None,
                _number(f1[at]) if present[at] else None,
            )
            for at, label in enumerate(labels)
        ),
        metrics.confusion_matrix(targets, predicted, labels=every),
        calibration(probabilities.max(1), predicted == targets),
        probabilities,
    )


def _first_wins(
    targets: NDArray[np.int64], logits: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Targets and logits with the classes in reverse.

    Of equal logits, which products of 16 bits often are, scikit-learn's top-k takes those of later
    classes, and the answer is the first one.
    """
    return logits.shape[1] - 1 - targets, logits[:, ::-1]


def _answers(
    logits: NDArray[np.float32],
    probabilities: NDArray[np.float64],
    targets: NDArray[np.int64],
    predicted: NDArray[np.int64],
) -> Answers:
    """As scikit-learn sees each image, of which it only gives means."""
    # It bounds what log is taken of.
    smallest = np.finfo(probabilities.dtype).eps
    own = np.take_along_axis(probabilities, targets[:, None], axis=1)[:, 0]
    reverse_targets, reverse_logits = _first_wins(targets, logits)
    first = np.argsort(reverse_logits, axis=1, kind="mergesort")[:, -FIRST:]
    return Answers(
        targets,
        predicted,
        -np.log(np.clip(own, smallest, 1 - smallest)),
        (first == reverse_targets[:, None]).any(1),
        probabilities.shape[1],
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
