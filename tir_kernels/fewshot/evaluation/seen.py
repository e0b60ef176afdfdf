"""Images that a classifier was made from, known by their pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.fitting import Support, read_support
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.evaluation.matching import some
from tir_kernels.text import renamed, setting

_SUPPORT = setting("support")


def support_of(
    classifier: Classifier,
    source: str,
    decoding: Decoding,
    *,
    images: str | None = None,
    skip_unreadable: bool = False,
) -> Support:
    """Read the images that a classifier was made from.

    Args:
        classifier: The classifier.
        source: Its labelled images, as they were given to ``fit``.
        decoding: Settings of the decoder.
        images: Folder of the images that a list names.
        skip_unreadable: As for ``ImageReader``.

    Raises:
        FewShotError: They can't be read, or are not those that the classifier was made from.
    """
    about = classifier.about
    try:
        data = load_data(
            source,
            images=images,
            # Of classifiers from before it was kept, subjects of known data sets are found.
            group_column=about.settings.get("group_column"),
            needs_words=False,
        )
    except FewShotError as error:
        notice = renamed(error.notice, "images", "support_images")
        raise FewShotError(renamed(notice, "data", "support").marked) from error
    entries = {entry.folder: entry for entry in data.classes if entry.files}
    if entries.keys() != set(about.labels):
        differing = sorted(entries.keys() ^ set(about.labels))
        raise _other(source, f"only one of the two has {some(list(map(repr, differing)))}")
    classes = tuple(
        replace(entries[label], words=words)
        for label, words in zip(about.labels, about.words, strict=True)
    )
    reader = ImageReader(
        data,
        classifier.model.preprocess,
        skip_unreadable=skip_unreadable,
        decoding=decoding,
        memory_bytes=0,
    )
    shots = about.settings["shots"]
    support = read_support(replace(data, classes=classes), reader, shots, about.seed)
    for label, found, expected in zip(about.labels, support.counts, about.support, strict=True):
        if found != expected:
            raise _other(source, f"it has {found} images of {label!r}, not {expected}")
    others = sum((Counter(support.digests) - Counter(about.support_digests)).values())
    if others:
        raise _other(source, f"{others} of its {len(support.labels)} images have other pixels")
    return support


def _other(source: str, why: str) -> FewShotError:
    return FewShotError(
        f"{_SUPPORT}: {source} is not what the classifier was made from: {why}; pass the data that "
        "fit was given"
    )
