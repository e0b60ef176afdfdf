"""What an evaluation found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tir_kernels.fewshot.evaluation.calibration import Calibration
from tir_kernels.fewshot.evaluation.scores import ClassScores, Score


class Prediction(NamedTuple):
    """The answer for one image.

    Attributes:
        image: Its name in the data.
        group: Its group; empty where it has none.
        label: Its class.
        predicted: The class of most probability.
        probability: That of the class that is predicted.
        label_probability: That of its own class.
    """

    image: str
    group: str
    label: str
    predicted: str
    probability: float
    label_probability: float


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a classifier on labelled images.

    Args:
        labels: The C classes in the order of the logits.
        images: Number of images that count.
        scores: "accuracy", "balanced_accuracy", "macro_f1", "log_loss" and with more than three
            classes "top3_accuracy", each with its 95 % interval; see ``compute_scores``.
        classes: The scores of each class, in the order of ``labels``.
        confusion: C rows of C images: of the class ``labels[row]``, called ``labels[column]``.
        calibration: Expected calibration error and its bins.
        temperature: Divisor of the logits in front of the softmax.
        groups: Number of groups that intervals are over; ``None``: they are over images.
        of_support: Number of images, left out or not, that the classifier was made from.
        of_support_subjects: Number of others, left out or not, of the same subjects as these.
        missing: Labels of which the data has no images, left out of means over classes.
        left_out: Class of the data that the classifier does not know -> its images.
        skipped: Images that can't be read.
        notes: Lines for the reader.
        predictions: The answers, by class and image.
    """

    labels: tuple[str, ...]
    images: int
    scores: Mapping[str, Score]
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration: Calibration
    temperature: float
    groups: int | None
    of_support: int
    of_support_subjects: int
    missing: tuple[str, ...]
    left_out: Mapping[str, int]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]
    predictions: tuple[Prediction, ...] = field(repr=False)

    @property
    def accuracy(self) -> Score:
        """The share of images that are classified rightly, with its interval."""
        return self.scores["accuracy"]

    def to_json(self) -> dict[str, Any]:
        """All but the predictions, as JSON values."""
        return {
            "images": self.images,
            "groups": self.groups,
            "temperature": self.temperature,
            "scores": {name: score._asdict() for name, score in self.scores.items()},
            "expected_calibration_error": self.calibration.error,
            "calibration_bins": [each._asdict() for each in self.calibration.bins],
            "classes": [each._asdict() for each in self.classes],
            "confusion": [list(row) for row in self.confusion],
            "images_of_support": self.of_support,
            "images_of_support_subjects": self.of_support_subjects,
            "missing_classes": list(self.missing),
            "left_out_classes": dict(self.left_out),
            "skipped_images": list(self.skipped),
            "notes": [str(note) for note in self.notes],
        }
