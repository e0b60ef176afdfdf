"""Two data sets as one: support comes from the first, queries from the second."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData, data_fingerprint, load_data
from tir_kernels.fewshot.data.parts import require_same_classes
from tir_kernels.fewshot.data.protocol import ImageSource, Stamp
from tir_kernels.fewshot.data.walk import FileId, file_id
from tir_kernels.text import renamed, setting

_PARTS = ("train", "test")


@dataclass(frozen=True)
class JoinedImages:
    """The images of two sources; names are those of the sources behind "train:" or "test:"."""

    train: ImageSource
    test: ImageSource

    @property
    def identity(self) -> str:
        """Both identities."""
        return json.dumps([self.train.identity, self.test.identity])

    def describe(self, name: str) -> str:
        """The place of an image in its source."""
        if not name:
            return f"{self.train.describe('')} and {self.test.describe('')}"
        source, own = self._find(name)
        return source.describe(own)

    def file(self, name: str) -> Path | IO[bytes]:
        """The file of an image, as its source gives it."""
        source, own = self._find(name)
        return source.file(own)

    def stamp(self, name: str) -> Stamp:
        """The stamp of an image, as its source gives it."""
        source, own = self._find(name)
        return source.stamp(own)

    def _find(self, name: str) -> tuple[ImageSource, str]:
        part, _, own = name.partition(":")
        return {"train": self.train, "test": self.test}[part], own


def load_split(
    train: str | Path,
    test: str | Path,
    *,
    class_names: Mapping[str, str] | str | Path | None = None,
    images: str | Path | None = None,
    group_column: str | None = None,
) -> ImageData:
    """List two data sets with the same classes, the first for support, the second for queries.

    Args:
        train, test: Data, as ``load_data`` takes it.
        class_names, images, group_column: As for ``load_data``, for both.

    Raises:
        FewShotError: One of them can't be used or is divided itself, their classes differ, or an
            image is in both.
    """
    parts = []
    for name, place in zip(_PARTS, (train, test), strict=True):
        with _data_called(name):
            part = load_data(
                place, class_names=class_names, images=images, group_column=group_column
            )
            if part.queries:
                raise FewShotError(
                    f"{setting('data')}: {place} is divided into parts itself; pass one of them"
                )
            parts.append(part)
    one, two = parts
    names = {each.folder for each in one.classes}, {each.folder for each in two.classes}
    require_same_classes(setting("test"), str(train), names[0], str(test), names[1])
    if one.group_column != two.group_column:
        raise FewShotError(
            f"{setting('group_column')}: {train} has the subjects of images in "
            f"{one.group_column or 'no column'}, {test} in {two.group_column or 'no column'}; give "
            f"both the same column, or pass {setting('group_column', 'none')}"
        )
    _refuse_shared_files(one, two)
    classes = tuple(_prefixed(each, "train") for each in one.classes)
    queries = tuple(_prefixed(each, "test") for each in two.classes)
    notes = [
        renamed(note, "data", name)
        for name, part in zip(_PARTS, parts, strict=True)
        for note in part.notes
    ]
    return ImageData(
        JoinedImages(one.source, two.source),
        classes,
        data_fingerprint((*classes, *queries)),
        tuple(dict.fromkeys(notes)),
        one.group_column,
        queries,
    )


@contextmanager
def _data_called(name: str) -> Iterator[None]:
    """Let errors of the setting "data" name another setting."""
    try:
        yield
    except FewShotError as error:
        raise FewShotError(renamed(error.notice, "data", name).marked) from error


def _prefixed(entry: ImageClass, part: str) -> ImageClass:
    return replace(entry, files=tuple(f"{part}:{name}" for name in entry.files))


def _refuse_shared_files(one: ImageData, two: ImageData) -> None:
    """Refuse an image that is in both, by whatever names."""
    if one.fingerprint == two.fingerprint:
        raise FewShotError(
            f"{setting('test')} is the same data as {setting('train')}; pass another"
        )
    train = _files(one)
    for file, name in _files(two).items():
        if file in train:
            raise FewShotError(
                f"{setting('test')}: {two.source.describe(name)} is also in {setting('train')}, as "
                f"{one.source.describe(train[file])}; remove it from one of them"
            )


def _files(data: ImageData) -> dict[FileId, str]:
    """The images of a data set that are files, by identity."""
    files = {}
    for entry in data.classes:
        for name in entry.files:
            file = data.source.file(name)
            if not isinstance(file, Path):  # rows that hold the images' bytes
                return {}
            files[file_id(os.stat(file))] = name
    return files
