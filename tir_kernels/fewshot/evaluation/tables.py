"""Tables of an evaluation."""

from __future__ import annotations

from tir_kernels.analysis.page.tables import Cell, Table
from tir_kernels.fewshot.evaluation.evaluation import Evaluation
from tir_kernels.fewshot.evaluation.notes import NAMES

PAIRS = 20  # most confused pairs


def score_table(found: Evaluation) -> Table:
    """The scores with their intervals."""
    rows: list[tuple[Cell, ...]] = [
        (NAMES[name], score.value, score.low, score.high) for name, score in found.scores.items()
    ]
    rows.append(("expected calibration error", found.calibration.error, None, None))
    title = f"Scores on {found.images} images"
    return Table(title, ("score", "value", "95 % from", "to"), tuple(rows))


def class_table(found: Evaluation) -> Table:
    """The scores of each class."""
    columns = ("class", "images", "precision", "recall", "F1")
    rows = tuple(
        (each.label, each.images, each.precision, each.recall, each.f1) for each in found.classes
    )
    return Table("Classes", columns, rows)


def confusion_table(found: Evaluation) -> Table:
    """Images by their class (rows) and the class that they are taken for (columns)."""
    rows = zip(found.labels, found.confusion, strict=True)
    return Table(
        "Images by class (rows) and answer (columns)",
        ("class", *found.labels),
        tuple((label, *counts) for label, counts in rows),
    )


def mistake_table(found: Evaluation) -> Table:
    """The pairs of classes that are confused most often."""
    pairs = [
        (count, found.labels[row], found.labels[column])
        for row, counts in enumerate(found.confusion)
        for column, count in enumerate(counts)
        if count and row != column
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = tuple((label, said, count) for count, label, said in pairs[:PAIRS])
    return Table("Most frequent mistakes", ("class", "taken for", "images"), rows)


def bin_table(found: Evaluation) -> Table:
    """The bins of the expected calibration error."""
    columns = ("confidence above", "up to", "images", "mean confidence", "accuracy")
    return Table("Calibration", columns, tuple(tuple(each) for each in found.calibration.bins))


def prediction_table(found: Evaluation) -> Table:
    """The answers."""
    columns = ("image", "group", "label", "predicted", "probability", "label_probability")
    return Table("Predictions", columns, tuple(tuple(each) for each in found.predictions))
