"""The images that a user names: files, folders, patterns, lists and shards, one after the other.

Nothing here holds more than a part of a folder, so that millions of images cost no memory, and the
order is the same each time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.formats import is_image_name
from tir_kernels.fewshot.data.walk import LeftOut
from tir_kernels.fewshot.predict.folders import has_wildcard, matches, spelled_out, walk
from tir_kernels.fewshot.predict.items import Image, Shard
from tir_kernels.fewshot.predict.lists import LIST_ENDINGS, listed, require_list
from tir_kernels.fewshot.predict.rows import digest
from tir_kernels.fewshot.predict.shards import is_shard_name, require_reader
from tir_kernels.files import expand_user
from tir_kernels.text import setting

IMAGES = setting("images")
STDIN = "-"


class Sources:
    """The images that arguments name.

    Args:
        arguments: Files, folders, patterns, lists of paths, shards, or "-" for paths on standard
            input.

    Attributes:
        left_out: What lay between images in folders, so far.

    Raises:
        FewShotError: An argument leads to nothing, a list can't be read, or what reads shards is
            missing.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.left_out = LeftOut()
        self._named: list[_Named] = []
        for argument in arguments:
            for one in spelled_out(argument) if not os.path.lexists(argument) else [argument]:
                self._named.append(self._find(one))

    @property
    def reads_stdin(self) -> bool:
        """Whether paths come from standard input, which can be read once only."""
        return any(each.kind == "stdin" for each in self._named)

    def __iter__(self) -> Iterator[Image | Shard]:
        for kind, name, path in self._named:
            if kind == "folder":
                yield from walk(name, self.left_out)
            elif kind == "pattern":
                yield from self._matching(name)
            elif kind == "stdin":
                yield from map(partial(_listed, beside=Path()), listed(None))
            elif kind == "list":
                yield from map(partial(_listed, beside=path.parent), listed(path))
            else:
                yield _one(name, path)

    def share(self, rank: int, count: int) -> Iterator[Image]:
        """The images of one of several processes.

        An image that is named several times goes to one process each time, since another would not
        know whether the row that it finds is that of its own naming. So names decide; shards, of
        which there may be few, are dealt out in turn, each as a whole.
        """
        numbers: dict[str, int] = {}
        for unit in self:
            if isinstance(unit, Shard):
                number = numbers.setdefault(unit.name, len(numbers)) if count > 1 else 0
                if number % count == rank:
                    yield from unit.images()
            elif count == 1 or digest(unit.name) % count == rank:
                yield unit

    def _find(self, argument: str) -> _Named:
        if argument == STDIN:
            if sys.stdin is None or sys.stdin.closed:
                raise FewShotError(f"{IMAGES}: - is standard input, which is closed")
            return _Named("stdin", argument, Path())
        try:
            path = expand_user(argument)
        except OSError as error:
            raise FewShotError(f"{IMAGES}: {argument}: {first_line(error)}") from error
        name = str(path) if argument.startswith("~") else argument
        if os.path.isdir(path):
            return _Named("folder", name, path)
        if os.path.lexists(path):
            if path.suffix.lower() in LIST_ENDINGS:
                require_list(path)
                return _Named("list", name, path)
            _one(name, path)  # refuses what can't be read, before the model is loaded
            return _Named("file", name, path)
        if not has_wildcard(name):
            raise FewShotError(f"{IMAGES}: there is no file or folder {argument}")
        if next(self._matching(name), None) is None:
            raise FewShotError(f"{IMAGES}: no image matches {argument}")
        self.left_out.clear()
        return _Named("pattern", name, path)

    def _matching(self, pattern: str) -> Iterator[Image | Shard]:
        for name, is_folder in matches(pattern):
            if is_folder:
                yield from walk(name, self.left_out)
            elif _is_wanted(name):
                yield _one(name, Path(name))
            else:
                self.left_out.file(name)


class _Named(NamedTuple):
    """An argument: "folder", "pattern", "stdin", "list" or "file"; its name, and its path."""

    kind: str
    name: str
    path: Path


def _is_wanted(name: str) -> bool:
    """Whether a file that a pattern matches is an image or a shard."""
    return is_image_name(name) or is_shard_name(name)


def _one(name: str, path: Path) -> Image | Shard:
    """An image or a shard.

    Raises:
        FewShotError: What reads shards is missing.
    """
    if not is_shard_name(name):
        return Image(name, path)
    require_reader()
    return Shard(name, path)


def _listed(found: Image | str, beside: Path) -> Image | Shard:
    """A listed image: a relative path is looked up beside the list, then in the current folder."""
    if isinstance(found, Image):
        return found
    path = Path(found)
    if not path.is_absolute() and os.path.lexists(beside / path):
        path = beside / path
    return _one(found, path)
