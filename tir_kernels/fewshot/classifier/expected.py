"""The accuracy that may be expected of a classifier, from its labelled images alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tir_kernels.fewshot.classifier.fitting import Fitter, Support
from tir_kernels.fewshot.methods.zero_shot import ZeroShot

_SEEDS = 10  # of folds, until each training has all classes


class FoldListener(Protocol):
    """A listener that is told how the held-out trainings go."""

    def step(self, fold: int, step: int, loss: float) -> None:
        """A step, counted from 0, of the training that leaves out a fold."""

    def finished(self, fold: int, correct: int, total: int) -> None:
        """That training classified so many of the fold's images rightly."""


def number_of_folds(fitter: Fitter, support: Support) -> int:
    """Held-out trainings: as set, but at most the subjects of the smallest class; 0 for none, also
    where each way to divide the subjects leaves a training without a class.
    """
    return len(_folds(fitter, support))


def held_out_parts(fitter: Fitter, support: Support) -> Iterator[tuple[Support, Support]]:
    """For each fold, the images of its training and those that it holds out; as many folds as
    ``number_of_folds`` says, and all images of a subject in one of them.
    """
    for rows in _folds(fitter, support):
        kept, held_out = (support.part(torch.from_numpy(each)) for each in rows)
        yield kept, held_out


def _folds(fitter: Fitter, support: Support) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """The rows of each training and of those that it holds out; none where there is no way."""
    counts = support.counts
    if support.groups:
        shown = set(zip(support.labels.tolist(), support.groups, strict=True))
        counts = [sum(own == label for own, _ in shown) for label in range(len(counts))]
    most = min(fitter.settings.folds, *counts)
    if most < 2:
        return []
    # Here, since it takes seconds to import, which nothing else needs to wait for.
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedGroupKFold if support.groups else StratifiedKFold
    labels = support.labels.numpy()
    # Subjects of several classes may take all of a class out of a training; then the next seeds
    # are tried.
    for seed in range(fitter.settings.seed, fitter.settings.seed + _SEEDS):
        splitter = kind(most, shuffle=True, random_state=seed % 2**32)
        rows = list(splitter.split(labels, labels, support.groups or None))
        if all(len(set(labels[kept])) == len(counts) for kept, _ in rows):
            return rows
    return []


def expected_accuracy(
    fitter: Fitter, support: Support, listener: FoldListener | None = None
) -> dict[str, Any]:
    """Estimate the accuracy on images that were not trained on.

    The labelled images are held out in stratified folds, each classified by a training on the
    others: k-fold cross-validation, whose trainings see fewer images than the classifier does. All
    images of a subject are in one fold.

    Args:
        fitter: The fit.
        support: All labelled images.
        listener: Told of steps and folds.

    Returns:
        "zero_shot_accuracy" on the same images, from the model as it is; and where there are
        folds, "held_out_accuracy" with the ends of its 95 % interval, "held_out_images",
        "held_out_folds" and, where subjects are known, "held_out_subjects". The interval is
        Wilson's for so many images; for so many subjects where these are known, as if all images
        of one were right or wrong together.
    """
    count = len(support.labels)
    figures: dict[str, Any] = {"zero_shot_accuracy": _zero_shot(fitter, support) / count}
    folds = number_of_folds(fitter, support)
    if not folds:
        return figures
    correct = 0
    for fold, (kept, held_out) in enumerate(held_out_parts(fitter, support)):
        own = _correct(fitter, fold, kept, held_out, listener)
        correct += own
        if listener is not None:
            listener.finished(fold, own, len(held_out.labels))
    subjects = len(set(support.groups))
    low, high = wilson_interval(correct / count, subjects or count)
    figures |= {
        "held_out_accuracy": correct / count,
        "held_out_low": low,
        "held_out_high": high,
        "held_out_images": count,
        "held_out_folds": folds,
    }
    return figures | ({"held_out_subjects": subjects} if subjects else {})


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The ends of Wilson's 95 % interval for a share of so many, which may be of parts of one.

    SciPy's ``binomtest(...).proportion_ci(method="wilson")``, which takes whole numbers alone.
    """
    # Here, since it takes seconds to import, which nothing else needs to wait for.
    from scipy.stats import norm

    z = float(norm.ppf(0.975))
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt((share * (1 - share) + z**2 / (4 * count)) / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _correct(
    fitter: Fitter, fold: int, kept: Support, held_out: Support, listener: FoldListener | None
) -> int:
    """How many images of a fold a training on the others classifies rightly."""
    part = f"fold{fold}"
    known = None if fitter.keeper is None else fitter.keeper.known(part)
    if known is not None:
        return int(known["correct"])
    on_step = None if listener is None else lambda step, loss: listener.step(fold, step, loss)
    result = fitter.train(part, fitter.episode(kept, held_out), on_step)
    correct = _matches(result.query_logits, held_out.labels)
    if fitter.keeper is not None:
        fitter.keeper.finish(part, {"correct": correct})
    return correct


def _zero_shot(fitter: Fitter, support: Support) -> int:
    """How many of the images the model as it is classifies rightly."""
    known = None if fitter.keeper is None else fitter.keeper.known("zero-shot")
    if known is not None:
        return int(known["correct"])
    zero_shot = fitter.of_method(ZeroShot())
    first = support.part(torch.arange(1))  # it learns from none, and the engine asks for one
    result = zero_shot.train("zero-shot", zero_shot.episode(first, support))
    correct = _matches(result.query_logits, support.labels)
    if fitter.keeper is not None:
        fitter.keeper.finish("zero-shot", {"correct": correct})
    return correct


def _matches(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())
