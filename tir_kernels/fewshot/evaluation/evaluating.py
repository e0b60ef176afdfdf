"""``fewshot.evaluate``: a classifier's answers to labelled images, and how good they are."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.fitting import pixel_digest
from tir_kernels.fewshot.classifier.folder import load_classifier
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData, load_data
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.protocol import Stamp
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.evaluation.evaluation import Evaluation, Prediction
from tir_kernels.fewshot.evaluation.kept import Answer, KeptLogits
from tir_kernels.fewshot.evaluation.matching import Matched, match_classes
from tir_kernels.fewshot.evaluation.notes import notes_on
from tir_kernels.fewshot.evaluation.scores import Scores, compute_scores
from tir_kernels.fewshot.evaluation.seen import support_of
from tir_kernels.fewshot.evaluation.settings import FIT, EvaluateSettings
from tir_kernels.fewshot.evaluation.temperature import fit_temperature, held_out_logits
from tir_kernels.fewshot.run_options import settings_named
from tir_kernels.text import Notice, setting


class _Image(NamedTuple):
    """An image of the data: its class among the labels, and its place among the class's files."""

    at: int
    entry: ImageClass
    position: int

    @property
    def name(self) -> str:
        return self.entry.files[self.position]

    @property
    def stamp(self) -> Stamp:
        return self.entry.stamps[self.position]

    @property
    def group(self) -> str:
        return self.entry.groups[self.position] if self.entry.groups else ""


_DEFAULT_SETTINGS = EvaluateSettings()
_COPY, _SUBJECT = "copy", "subject"


def evaluate(
    classifier: Classifier | str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    support: str | os.PathLike[str] | None = None,
    support_images: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    settings: EvaluateSettings = _DEFAULT_SETTINGS,
) -> Evaluation:
    """Evaluate a classifier on labelled images.

    Args:
        classifier: The classifier, or its folder.
        data: Labelled images, see ``load_data``; their classes are matched with the classifier's
            by name, in any order.
        images: Folder of the images that a list names.
        support: The data that ``fit`` was given, to fit a temperature on the images that the
            classifier was made from.
        support_images: Folder of the images that ``support`` names, where that is a list.
        out: Folder for answers as they are made, and for tables, figures and a page; a call that
            was stopped is continued by the same one.
        settings: Everything else.

    Raises:
        FewShotError: The data can't be used or has classes that the classifier does not know, an
            image can't be read, or the folder can't be used.
    """
    if not isinstance(classifier, Classifier):
        classifier = load_classifier(classifier)
    lines: list[str] = []
    evaluator = Evaluator(classifier, settings, lines.append)
    given = {"images": images, "support": support, "support_images": support_images, "out": out}
    names = {name: None if each is None else os.fspath(each) for name, each in given.items()}
    try:
        found = evaluator.evaluate(os.fspath(data), **names)
    finally:
        for line in lines:
            warnings.warn(line, stacklevel=2)
    if names["out"] is not None:
        from tir_kernels.fewshot.evaluation.files import write_files

        write_files(found, names["out"])
    return found


class Evaluator:
    """Evaluates a classifier on labelled images.

    Args:
        classifier: The classifier.
        settings: All but the data.
        tell: Called with a line for the user.
        progress: Called with the number of images that are done, and of all.
    """

    def __init__(
        self,
        classifier: Classifier,
        settings: EvaluateSettings = _DEFAULT_SETTINGS,
        tell: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._classifier = classifier
        self._settings = settings
        self._tell = tell or (lambda line: None)
        self._progress = progress or (lambda done, total: None)
        own = classifier.about.white_value
        self._white_value = own if settings.white_value is None else settings.white_value
        with settings_named():
            self._decoding = Decoding(settings.max_pixels, self._white_value)
            # The classifier's images are read as they were by its fit.
            white_value = self._white_value if own is None else own
            self._support_decoding = Decoding(settings.max_pixels, white_value)

    def evaluate(
        self,
        data: str,
        images: str | None = None,
        support: str | None = None,
        support_images: str | None = None,
        out: str | None = None,
    ) -> Evaluation:
        """Evaluate; the arguments, and what is raised, are those of ``evaluate``."""
        settings, about = self._settings, self._classifier.about
        if settings.temperature == FIT and support is None:
            raise FewShotError(
                f"{setting('temperature', FIT)} needs the labelled images that the classifier was "
                f"made from, and never the evaluated ones: pass {setting('support')}"
            )
        if support_images is not None and support is None:
            raise FewShotError(f"{setting('support_images')} goes with {setting('support')}")
        listed = load_data(
            data, images=images, group_column=settings.group_column, needs_words=False
        )
        for note in listed.notes:
            self._tell(note)
        if listed.queries:
            self._tell(f"of {listed.name}, images of the part for queries are evaluated")
        matched = match_classes(about, listed, leave_out_unknown=settings.leave_out_unknown)
        own = None
        if support is not None:
            own = support_of(
                self._classifier,
                support,
                self._support_decoding,
                images=support_images,
                skip_unreadable=settings.skip_unreadable,
            )
        wanted = [
            _Image(at, entry, position)
            for at, entry in sorted(matched.classes.items())
            for position in range(len(entry.files))
        ]
        with KeptLogits(out, self._identity(listed), len(about.labels)) as kept:
            skipped = self._answer(listed, wanted, kept)
            rows = [(each, kept.answers[each.name]) for each in wanted if each.name not in skipped]
        temperature = settings.temperature or about.temperature
        if temperature == FIT and own is not None:
            self._tell(
                f"{setting('temperature', FIT)}: the method is trained again without each part of "
                f"the {len(own.labels)} images of {setting('support')} in turn"
            )
            temperature = fit_temperature(*held_out_logits(self._classifier, own))
        return self._evaluation(rows, float(temperature), matched, skipped, listed)

    def _identity(self, data: ImageData) -> dict[str, object]:
        """All that decides the logits besides the images' stamps."""
        about = self._classifier.about
        content = about.to_json()
        for name in ("figures", "temperature", "versions", "white_value"):
            del content[name]
        content["base"] = about.base.fingerprint
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for name, tensor in sorted(self._classifier.learned.items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return {
            "classifier": digest.hexdigest()[:16],
            "data": data.source.identity,
            "precision": self._classifier.runtime.precision,
            "white_value": self._white_value,
        }

    def _answer(self, data: ImageData, wanted: list[_Image], kept: KeptLogits) -> frozenset[str]:
        """Classify the images that have no answer yet; gives the names of unreadable ones."""
        waiting = [
            each
            for each in wanted
            if (answer := kept.answers.get(each.name)) is None or answer.stamp != each.stamp
        ]
        self._progress(len(wanted) - len(waiting), len(wanted))
        if not waiting:
            return frozenset()
        preprocess, skipped = self._classifier.model.preprocess, set()
        images = ImageReader(
            data,
            preprocess,
            skip_unreadable=self._settings.skip_unreadable,
            memory_bytes=0,  # each is asked for once
            decoding=self._decoding,
            notify=self._tell,
        )
        done = len(wanted) - len(waiting)
        with self._classifier.open() as scorer:
            for some_images in _batches(waiting, self._settings.batch_size):
                found = images.read_many([(each.entry, each.position) for each in some_images])
                pairs = list(zip(some_images, found, strict=True))
                readable = [(each, pixels) for each, pixels in pairs if pixels is not None]
                skipped |= {each.name for each, pixels in pairs if pixels is None}
                if readable:
                    pixels = torch.stack([own for _, own in readable])
                    logits = scorer.logits(preprocess.normalise(pixels)).numpy()
                    self._require_numbers(logits, data, [each for each, _ in readable])
                    kept.keep(
                        (each.name, Answer(each.stamp, pixel_digest(own), row))
                        for (each, own), row in zip(readable, logits, strict=True)
                    )
                done += len(some_images)
                self._progress(done, len(wanted))
        return frozenset(skipped)

    def _require_numbers(self, logits: np.ndarray, data: ImageData, images: list[_Image]) -> None:
        bad = ~np.isfinite(logits).all(1)
        if bad.any():
            name = data.source.describe(images[int(bad.argmax())].name)
            advice = f"pass {setting('precision', 'float32')}"
            if self._classifier.runtime.precision == "float32":
                advice = "make the classifier anew with lower learning rates"
            raise FewShotError(f"the classifier's logits of {name} are not finite; {advice}")

    def _evaluation(
        self,
        rows: list[tuple[_Image, Answer]],
        temperature: float,
        matched: Matched,
        skipped: frozenset[str],
        data: ImageData,
    ) -> Evaluation:
        settings, labels = self._settings, self._classifier.labels
        own = _own(rows, self._classifier.about.support_digests)
        if settings.exclude_support:
            rows = [row for row, kind in zip(rows, own, strict=True) if kind is None]
        if not rows:
            raise FewShotError(
                f"no image of {data.name} is left to evaluate: {own.count(_COPY)} are the "
                f"classifier's own, {own.count(_SUBJECT)} show the same subjects, and "
                f"{len(skipped)} can't be read"
            )
        groups = None
        if data.group_column:
            groups = np.unique([each.group for each, _ in rows], return_inverse=True)[1]
        scores = compute_scores(
            np.stack([answer.logits for _, answer in rows]),
            np.array([each.at for each, _ in rows]),
            labels,
            temperature,
            groups=groups,
            resamples=settings.bootstrap,
            seed=settings.seed,
        )
        present = {each.at for each, _ in rows}
        missing = tuple(label for at, label in enumerate(labels) if at not in present)
        found = Evaluation(
            labels=labels,
            images=len(rows),
            scores=scores.scores,
            classes=scores.classes,
            confusion=tuple(map(tuple, scores.confusion.tolist())),
            calibration=scores.calibration,
            temperature=temperature,
            groups=None if groups is None else int(groups.max()) + 1,
            of_support=own.count(_COPY),
            of_support_subjects=own.count(_SUBJECT),
            missing=missing,
            left_out={entry.folder: len(entry.files) for entry in matched.left_out},
            skipped=tuple(sorted(skipped)),
            notes=(),
            predictions=tuple(_predictions(rows, labels, scores)),
        )
        notes = tuple(map(Notice, notes_on(found, self._classifier.about, matched, data, settings)))
        for note in notes:
            self._tell(note)
        return replace(found, notes=notes)


def _own(rows: list[tuple[_Image, Answer]], digests: Sequence[str]) -> list[str | None]:
    """For each image whether the classifier was made from it, or it shows a subject of one that
    the classifier was made from; ``None``: neither.
    """
    known = frozenset(digests)
    subjects = {each.group for each, answer in rows if answer.digest in known} - {""}
    return [
        _COPY if answer.digest in known else _SUBJECT if each.group in subjects else None
        for each, answer in rows
    ]


def _batches(images: list[_Image], size: int) -> Iterator[list[_Image]]:
    for first in range(0, len(images), size):
        yield images[first : first + size]


def _predictions(
    rows: list[tuple[_Image, Answer]], labels: tuple[str, ...], scores: Scores
) -> Iterator[Prediction]:
    for (each, answer), probabilities in zip(rows, scores.probabilities, strict=True):
        predicted = int(answer.logits.argmax())
        yield Prediction(
            image=each.name,
            # An image without a value in the column is a group of its own, see ``read_groups``.
            group="" if each.group.startswith("\0") else each.group,
            label=labels[each.at],
            predicted=labels[predicted],
            probability=float(probabilities[predicted]),
            label_probability=float(probabilities[each.at]),
        )
