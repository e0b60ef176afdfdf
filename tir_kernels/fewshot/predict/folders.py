"""Folders and patterns, walked in the order of names without holding all of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import translate
from heapq import nsmallest
from itertools import product
from pathlib import Path

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.formats import is_image_name
from tir_kernels.fewshot.data.walk import FileId, LeftOut, file_id, is_left_by_tools
from tir_kernels.fewshot.predict.items import Image
from tir_kernels.text import setting

# Names of a folder that are held and sorted at once; the folder is read once for each such part.
_AT_ONCE = 2**16
_MOST_SPELLED = 10**6
_WILDCARD = re.compile(r"[*?[]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def walk(root: str, left_out: LeftOut) -> Iterator[Image]:
    """The images in a folder and in those below it, by name; links are followed.

    A folder that can't be read stands among the images, with the reason.

    Args:
        root: The folder.
        left_out: Counts all else.
    """
    # Not by recursion: folders may lie deeper than Python's stack.
    waiting: list[tuple[FileId | None, Iterator[os.DirEntry[str] | Image]]] = [
        (_id(root), _entries(root))
    ]
    while waiting:
        entry = next(waiting[-1][1], None)
        if entry is None:
            waiting.pop()
        elif isinstance(entry, Image):
            yield entry
        elif is_left_by_tools(entry.name):
            if is_image_name(entry.name):
                left_out["image", "hidden or left by another program"] += 1
        elif _is_folder(entry):
            own = _id(entry.path)
            if own is not None and any(own == above for above, _ in waiting):
                left_out["link", "to a folder that it lies in"] += 1
            else:
                waiting.append((own, _entries(entry.path)))
        elif is_image_name(entry.name):
            yield Image(entry.path, Path(entry.path))
        else:
            left_out.file(entry.name)


def has_wildcard(text: str) -> bool:
    """Whether a name is a pattern: of ``*``, ``?``, ``[...]``, or ``**`` for any depth."""
    return _WILDCARD.search(text) is not None


def spelled_out(text: str) -> Iterator[str]:
    """The names that ``{0000..0123}`` stands for, as shells and WebDataset write it.

    Raises:
        FewShotError: They are more than a million.
    """
    parts = _RANGE.split(text)
    plain, firsts, lasts = parts[::3], parts[1::3], parts[2::3]
    ranges = [range(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]
    total = 1
    for each in ranges:
        total *= len(each)
    if total > _MOST_SPELLED:
        raise FewShotError(f"{setting('images')}: {text} stands for {total} names")
    for numbers in product(*ranges):
        words = [plain[0]]
        for number, first, rest in zip(numbers, firsts, plain[1:], strict=True):
            words += [f"{number:0{len(first)}}", rest]
        yield "".join(words)


def matches(pattern: str) -> Iterator[tuple[str, bool]]:
    """The names that a pattern matches and whether each is a folder, in a fixed order."""
    parts = re.split("/+", pattern)
    fixed = next(n for n, part in enumerate(parts) if has_wildcard(part))
    start = "/".join(parts[:fixed])
    yield from _matching(f"{start}/" if fixed else "", tuple(parts[fixed:]))


def _matching(folder: str, parts: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """Matches in a folder, whose name ends in a slash or is empty."""
    first, rest = parts[0], parts[1:]
    if not has_wildcard(first):
        name = folder + first
        if rest and os.path.isdir(name):
            yield from _matching(f"{name}/", rest)
        elif not rest and os.path.exists(name):
            yield name.rstrip("/"), os.path.isdir(name)
        return
    if first == "**" and rest:
        yield from _matching(folder, rest)
    fits = re.compile("(?s:.*)\\Z" if first == "**" else translate(first)).match
    for entry in _entries(folder or "."):
        if isinstance(entry, Image) or not fits(entry.name):
            continue
        if is_left_by_tools(entry.name) and not first.startswith("."):
            continue
        name, is_folder = folder + entry.name, _is_folder(entry)
        if first == "**" and rest:
            if is_folder and not entry.is_symlink():
                yield from _matching(f"{name}/", parts)
        elif rest:
            if is_folder:
                yield from _matching(f"{name}/", rest)
        else:
            yield name, is_folder


def _entries(folder: str) -> Iterator[os.DirEntry[str] | Image]:
    """A folder's entries by name; where it can't be read, the folder with the reason."""
    last = ""
    while True:
        try:
            with os.scandir(folder) as entries:
                some = nsmallest(
                    _AT_ONCE, (each for each in entries if each.name > last), key=_name
                )
        except OSError as error:
            yield Image(folder, error)
            return
        yield from some
        if len(some) < _AT_ONCE:
            return
        last = some[-1].name


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _id(path: str) -> FileId | None:
    try:
        return file_id(os.stat(path))
    except OSError:
        return None
