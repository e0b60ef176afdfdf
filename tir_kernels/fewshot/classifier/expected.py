"""The accuracy that may be expected of a classifier, from its labelled images alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tir_kernels.fewshot.classifier.fitting import Fitter, Support
from tir_kernels.fewshot.methods.zero_shot import ZeroShot

StepListener = Callable[[int, int, float], None]


def expected_accuracy(
    fitter: Fitter, support: Support, on_step: StepListener | None = None
) -> dict[str, Any]:
    """Estimate the accuracy on images that were not trained on.

    The labelled images are held out in stratified folds, each classified by a training on the
    others: k-fold cross-validation, whose trainings see fewer images than the classifier does.

    Args:
        fitter: The fit.
        support: All labelled images.
        on_step: Called with the fold, the step, from 0, and its loss.

    Returns:
        "zero_shot_accuracy" on the same images, from the model as it is; and where the smallest
        class has two images or more, "held_out_accuracy" with the ends of its 95 % interval
        (Wilson), "held_out_images" and "held_out_folds".
    """
    figures: dict[str, Any] = {"zero_shot_accuracy": _zero_shot(fitter, support)}
    smallest = int(torch.bincount(support.labels).min())
    folds = min(fitter.settings.folds, smallest)
    if folds < 2:
        return figures
    # Here, since they take seconds to import, which nothing else needs to wait for.
    from scipy.stats import binomtest
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(folds, shuffle=True, random_state=fitter.settings.seed % 2**32)
    correct = 0
    for fold, (kept, held_out) in enumerate(splitter.split(support.labels, support.labels)):
        correct += _correct(fitter, support, fold, (kept, held_out), on_step)
    count = len(support.labels)
    interval = binomtest(correct, count).proportion_ci(0.95, "wilson")
    return figures | {
        "held_out_accuracy": correct / count,
        "held_out_low": float(interval.low),
        "held_out_high": float(interval.high),
        "held_out_images": count,
        "held_out_folds": folds,
    }


def _correct(
    fitter: Fitter,
    support: Support,
    fold: int,
    rows: tuple[Any, Any],
    on_step: StepListener | None,
) -> int:
    """How many images of a fold a training on the others classifies rightly."""
    part = f"fold{fold}"
    known = None if fitter.keeper is None else fitter.keeper.known(part)
    if known is not None:
        return int(known["correct"])
    kept, held_out = (support.part(torch.from_numpy(each)) for each in rows)
    listener = None if on_step is None else lambda step, loss: on_step(fold, step, loss)
    result = fitter.train(part, fitter.episode(kept, held_out), listener)
    correct = _matches(result.query_logits, held_out.labels)
    if fitter.keeper is not None:
        fitter.keeper.finish(part, {"correct": correct})
    return correct


def _zero_shot(fitter: Fitter, support: Support) -> float:
    zero_shot = fitter.of_method(ZeroShot())
    first = support.part(torch.arange(1))  # it learns from none, and the engine asks for one
    result = zero_shot.train("zero-shot", zero_shot.episode(first, support))
    return _matches(result.query_logits, support.labels) / len(support.labels)


def _matches(logits: Tensor, labels: Tensor) -> int:
    return int((logits.argmax(1) == labels).sum())
