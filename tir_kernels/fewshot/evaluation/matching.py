"""The classes of labelled data among those of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.about import About
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.words import default_words
from tir_kernels.text import setting

_SHOWN = 6


@dataclass(frozen=True)
class Matched:
    """Data whose classes are known to the classifier.

    Args:
        classes: Those of the data that are evaluated, by their position among the labels.
        missing: Labels of which the data has no images.
        left_out: Classes of the data that the classifier does not know.
    """

    classes: dict[int, ImageClass]
    missing: tuple[str, ...]
    left_out: tuple[ImageClass, ...]


def match_classes(about: About, data: ImageData, *, leave_out_unknown: bool = False) -> Matched:
    """Match the classes of data with a classifier's labels, by their names.

    Of data with a part for queries, such as a folder of train and test, that part is taken.

    Args:
        about: The classifier's description.
        data: The data.
        leave_out_unknown: Leave out classes that the classifier does not know.

    Raises:
        FewShotError: The data has such classes, or none that the classifier knows.
    """
    places = {label: at for at, label in enumerate(about.labels)}
    given = [entry for entry in data.queries or data.classes if entry.files]
    known = {places[entry.folder]: entry for entry in given if entry.folder in places}
    unknown = tuple(entry for entry in given if entry.folder not in places)
    missing = tuple(label for at, label in enumerate(about.labels) if at not in known)
    if unknown and not (leave_out_unknown and known):
        if not known:
            what = f"the classifier knows no class of {data.name} ({_names(unknown)}); its classes"
            what += f" are {some(about.labels)}"
            advice = "take the classifier or the data that is meant"
        else:
            what = f"the classifier does not know {_classes(unknown)} of {data.name}"
            advice = f"rename or remove them, or pass {setting('leave_out_unknown')}"
        renamed = _renamed(unknown, missing, about)
        if renamed:
            advice = f"rename them in the data: {renamed}"
        raise FewShotError(f"{setting('data')}: {what}; {advice}")
    return Matched(known, missing, unknown)


def renamed_notes(about: About, matched: Matched) -> str:
    """Which of the classes that are left out seem to be a missing one under another name."""
    return _renamed(matched.left_out, matched.missing, about)


def _renamed(unknown: Sequence[ImageClass], missing: Sequence[str], about: About) -> str:
    words = dict(zip(about.labels, about.words, strict=True))
    spellings: dict[str, str] = {}
    for label in missing:
        for name in (label, words[label], default_words(label)):
            spellings.setdefault(_plain(name), label)
    pairs = []
    for entry in unknown:
        names = map(_plain, (entry.folder, default_words(entry.folder)))
        found = next((spellings[name] for name in names if name in spellings), None)
        if found is not None:
            pairs.append(f"{entry.folder!r} is {found!r} in the classifier")
    return some(pairs)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _classes(entries: Sequence[ImageClass]) -> str:
    return f"{'class' if len(entries) == 1 else f'{len(entries)} classes'} {_names(entries)}"


def _names(entries: Sequence[ImageClass]) -> str:
    return some([repr(entry.folder) for entry in entries])


def some(names: Sequence[str]) -> str:
    """The first of some names, in a list."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
