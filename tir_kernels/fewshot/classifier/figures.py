"""What was measured of a classifier, in words and per cent: for its card and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tir_kernels.text import Notice, setting

_OTHERS = {"final_loss": "loss of the last training step"}
_HELD_OUT = "held_out_"
_MOST_UNEVEN = 3  # times as many images in the largest class as in the smallest


class Figure(NamedTuple):
    """One figure.

    Attributes:
        name: What was measured.
        value: Its value, rounded.
        meaning: What it says, and what not.
    """

    name: str
    value: str
    meaning: str


def percent(share: float) -> str:
    """A share in [0, 1] in per cent, to a tenth."""
    return f"{100 * share:.1f} %"


def accuracy_figures(figures: Mapping[str, Any]) -> list[Figure]:
    """The accuracies that a fit has measured."""
    found = []
    if "support_accuracy" in figures:
        found.append(
            Figure(
                "accuracy on the images themselves",
                percent(figures["support_accuracy"]),
                "optimistic: the classifier was made from these images",
            )
        )
    if "held_out_accuracy" in figures:
        low, high = (f"{100 * figures[f'{_HELD_OUT}{end}']:.1f}" for end in ("low", "high"))
        own, folds = figures["held_out_accuracy"], figures["held_out_folds"]
        subjects = figures.get("held_out_subjects")
        counted = f"; the interval is for {subjects} subjects" if subjects else ""
        found.append(
            Figure(
                "held-out estimate",
                f"{percent(own)} (95 % interval {low} to {high} %)",
                f"{folds}-fold: each image by one of {folds} trainings without it, which see fewer "
                f"images than the classifier{counted}",
            )
        )
    if "zero_shot_accuracy" in figures:
        found.append(
            Figure(
                "zero-shot on the same images",
                percent(figures["zero_shot_accuracy"]),
                "the base model with the classes' words, untrained",
            )
        )
    return found


def all_figures(figures: Mapping[str, Any], support: Sequence[int]) -> list[Figure]:
    """The accuracies, that of chance, and whatever else was measured."""
    accuracies = accuracy_figures(figures)
    found = [*accuracies]
    if accuracies:
        meaning = "the largest class as the answer to every one of these images"
        found.append(Figure("chance", percent(chance(support)), meaning))
    told = {"support_accuracy", "zero_shot_accuracy"}
    for name, value in figures.items():
        if name in told or name.startswith(_HELD_OUT):
            continue
        found.append(Figure(_OTHERS.get(name, name.replace("_", " ")), _shown(name, value), ""))
    return found


def chance(support: Sequence[int]) -> float:
    """The accuracy of always answering the largest class, from the number of images of each."""
    return max(support) / sum(support)


def doubts(figures: Mapping[str, Any], support: Sequence[int]) -> list[str]:
    """Reasons in the figures not to trust the classifier yet."""
    found = []
    is_held_out = "held_out_accuracy" in figures
    kind = "held-out estimate" if is_held_out else "accuracy on the images themselves"
    own = figures["held_out_accuracy" if is_held_out else "support_accuracy"]
    zero_shot = figures["zero_shot_accuracy"]
    if own < zero_shot:
        found.append(
            f"the {kind}, {percent(own)}, is below zero-shot, {percent(zero_shot)}: the base model "
            "alone may serve better. Add images, or try another method or lower learning rates"
        )
    if is_held_out and figures["held_out_low"] < chance(support):
        found.append(
            f"the interval of the held-out estimate reaches below chance, "
            f"{percent(chance(support))} for always answering the largest class: so few images do "
            "not show that anything was learned. Add images"
        )
    return found


def why_no_estimate(folds: int, support: Sequence[int]) -> str:
    """Why there is no held-out estimate.

    Args:
        folds: Folds as set.
        support: Images of each class.
    """
    if not folds:
        return "none was asked for"
    if min(support) == 1:
        return "a class has one image"
    return "a class has images of one subject alone, or its subjects are those of other classes"


def imbalance_note(
    labels: Sequence[str], support: Sequence[int], takes_weights: bool
) -> Notice | None:
    """A line on classes of very unequal size; ``None`` where they are not.

    Args:
        labels: The classes.
        support: Images of each.
        takes_weights: Whether the method heeds weights of classes.
    """
    largest, smallest = max(support), min(support)
    if largest <= _MOST_UNEVEN * smallest:
        return None
    named = labels[support.index(largest)], labels[support.index(smallest)]
    weights = f"{setting('balance', 'loss')} lets all count alike, " if takes_weights else ""
    return Notice(
        f"class {named[0]!r} has {largest} images and {named[1]!r} has {smallest}, so that large "
        f"classes count for more: {weights}{setting('shots', smallest)} takes as many of each"
    )


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return percent(value) if name.endswith(("accuracy", "_low", "_high")) else f"{value:.4g}"
    return str(value)
