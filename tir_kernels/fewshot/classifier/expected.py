"""The accuracy that may be expected of a classifier, from its labelled images alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from tir_kernels.fewshot.classifier.fitting import Fitter, Support
from tir_kernels.fewshot.methods.zero_shot import ZeroShot


class FoldListener(Protocol):
    """A listener that is told how the held-out trainings go."""

    def step(self, fold: int, step: int, loss: float) -> None:
        """A step, counted from 0, of the training that leaves out a fold."""

    def finished(self, fold: int, correct: int, total: int) -> None:
        """That training classified so many of the fold's images rightly."""


def number_of_folds(fitter: Fitter, support: Support) -> int:
    """Held-out trainings: as set, but at most the subjects of the smallest class; 0 for none."""
    counts = support.counts
    if support.groups:
        shown = set(zip(support.labels.tolist(), support.groups, strict=True))
        counts = [sum(own == label for own, _ in shown) for label in range(len(counts))]
    folds = min(fitter.settings.folds, *counts)
    return folds if folds >= 2 else 0


def held_out_parts(fitter: Fitter, support: Support) -> Iterator[tuple[Support, Support]]:
    """For each fold, the images of its training and those that it holds out; as many folds as
    ``number_of_folds`` says, and all images of a subject in one of them.
    """
    folds = number_of_folds(fitter, support)
    if not folds:
        return
    # Here, since it takes seconds to import, which nothing else needs to wait for.
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedGroupKFold if support.groups else StratifiedKFold
    splitter = kind(folds, shuffle=True, random_state=fitter.settings.seed % 2**32)
    for rows in splitter.split(support.labels, support.labels, support.groups or None):
        kept, held_out = (support.part(torch.from_numpy(each)) for each in rows)
        yield kept, held_out


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
        "zero_shot_accuracy" on the same images, from the model as it is; and where the smallest
        class has two images or more, "held_out_accuracy" with the ends of its 95 % interval
        (Wilson), "held_out_images" and "held_out_folds".
    """
    count = len(support.labels)
    figures: dict[str, Any] = {"zero_shot_accuracy": _zero_shot(fitter, support) / count}
    folds = number_of_folds(fitter, support)
    if not folds:
        return figures
    # Here, since it takes seconds to import, which nothing else needs to wait for.
    from scipy.stats import binomtest

    correct = 0
    for fold, (kept, held_out) in enumerate(held_out_parts(fitter, support)):
        own = _correct(fitter, fold, kept, held_out, listener)
        correct += own
        if listener is not None:
            listener.finished(fold, own, len(held_out.labels))
    interval = binomtest(correct, count).proportion_ci(0.95, "wilson")
    return figures | {
        "held_out_accuracy": correct / count,
        "held_out_low": float(interval.low),
        "held_out_high": float(interval.high),
        "held_out_images": count,
        "held_out_folds": folds,
    }


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
