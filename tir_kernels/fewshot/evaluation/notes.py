"""What the reader of an evaluation has to know beside its numbers."""

from __future__ import annotations

from collections.abc import Iterator

from tir_kernels.fewshot.classifier.about import About
from tir_kernels.fewshot.data.dataset import ImageData
from tir_kernels.fewshot.data.groups import NO_GROUPS
from tir_kernels.fewshot.evaluation.evaluation import Evaluation
from tir_kernels.fewshot.evaluation.matching import Matched, renamed_notes, some
from tir_kernels.fewshot.evaluation.settings import FIT, EvaluateSettings
from tir_kernels.text import setting

NAMES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "log_loss": "log loss",
    "top3_accuracy": "top-3 accuracy",
}


def notes_on(
    found: Evaluation,
    about: About,
    matched: Matched,
    data: ImageData,
    settings: EvaluateSettings,
) -> Iterator[str]:
    """Sentences on what was left out, and on what the numbers do not say.

    Args:
        found: The evaluation.
        about: The classifier's description.
        matched: The classes.
        data: The data.
        settings: Settings of the evaluation.
    """
    if matched.left_out:
        count = sum(found.left_out.values())
        names = some(list(map(repr, found.left_out)))
        renamed = renamed_notes(about, matched)
        more = f"; {renamed}: rename such classes in the data to have them count" * bool(renamed)
        yield (
            f"left out: {_images(count)} of classes that the classifier does not know ({names})"
            f"{more}"
        )
    if found.missing:
        yield (
            f"no images of {len(found.missing)} of the classifier's {len(found.labels)} classes "
            f"({some(list(map(repr, found.missing)))}): they are left out of balanced accuracy and "
            "macro F1, and answers that name them are wrong"
        )
    if found.skipped:
        names = some([data.source.describe(name) for name in found.skipped])
        yield f"left out: {_images(len(found.skipped))} that can't be read ({names})"
    yield from _on_support(found, settings)
    yield from _on_intervals(found, about, data, settings)
    if settings.temperature == FIT:
        yield (
            f"temperature {found.temperature:.4g} was fitted on the {sum(about.support)} images "
            "that the classifier was made from, each held out in its turn"
        )


def _on_support(found: Evaluation, settings: EvaluateSettings) -> Iterator[str]:
    if not found.of_support:
        return
    others = found.of_support_subjects
    if settings.exclude_support:
        more = f", and {others} more of the same subjects" * bool(others)
        yield f"left out: {_images(found.of_support)} that the classifier was made from{more}"
        return
    more = f", and {others} more show the same subjects" * bool(others)
    yield (
        f"{found.of_support} of the {_images(found.images)} are among those that the "
        f"classifier was made from{more}: accuracy on them is optimistic; leave them out with "
        f"{setting('exclude_support')}"
    )


def _on_intervals(
    found: Evaluation, about: About, data: ImageData, settings: EvaluateSettings
) -> Iterator[str]:
    if not settings.bootstrap:
        return
    units = "images" if found.groups is None else f"subjects of column {data.group_column}"
    count = found.images if found.groups is None else found.groups
    if count < 2:
        yield f"no intervals: they need 2 {units} or more"
        return
    if found.groups is not None:
        yield (
            f"intervals are over the {count} {units}; over images, which "
            f"{setting('group_column', NO_GROUPS)} gives, they would say less about other subjects"
        )
    column = about.settings.get("group_column", NO_GROUPS) or NO_GROUPS
    if found.groups is None and settings.group_column is None and column != NO_GROUPS:
        yield (
            "intervals are over images; where several show one subject they are too narrow: the "
            f"classifier's images have their subjects in column {column}, and "
            f"{setting('group_column', column)} takes that of a table with such a column"
        )
    narrow = [NAMES[name] for name, score in found.scores.items() if score.low == score.high]
    if narrow:
        yield (
            f"the interval of {', '.join(narrow)} has no width, since all resamples of these "
            f"{count} {units} agree; it does not say how far other images may differ"
        )


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
