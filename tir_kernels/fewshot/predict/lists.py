"""Lists of paths: one a line, or a column of a table; read as they come."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.documents import find_delimiter
from tir_kernels.fewshot.predict.items import Image
from tir_kernels.files import open_regular
from tir_kernels.text import setting

TABLE_ENDINGS = (".csv", ".tsv")
LIST_ENDINGS = (".txt", ".lst", ".list", *TABLE_ENDINGS)

_IMAGES = setting("images")
# Names of columns in lower case, without spaces and underscores; the likelier first.
_COLUMNS = ("image", "path", "file", "filename", "filepath", "imagepath", "imagefile")
_LONGEST_LINE = 2**16
_MARKS_OF_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_MARK_OF_UTF_8 = b"\xef\xbb\xbf"


def require_list(path: Path) -> None:
    """Check what can be checked of a list at its first line.

    Raises:
        FewShotError: It can't be read, or is no list of paths.
    """
    next(listed(path), None)


def listed(path: Path | None) -> Iterator[Image | str]:
    """The paths that a list holds; a row without one stands among them, with the reason.

    Args:
        path: The list; ``None``: standard input, with a path on each line.

    Raises:
        FewShotError: It can't be read, or is no such list.
    """
    name = "standard input" if path is None else str(path)
    with ExitStack() as stack:
        try:
            file: BinaryIO
            if path is None:
                file = sys.stdin.buffer
            else:
                file = stack.enter_context(open_regular(path))
            if path is not None and path.suffix.lower() in TABLE_ENDINGS:
                yield from _column(name, file)
            else:
                yield from _lines(name, file)
        except OSError as error:
            raise FewShotError(f"{_IMAGES}: can't read {name}: {first_line(error)}") from error


def _lines(name: str, file: BinaryIO) -> Iterator[str]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if number == 1:
            _require_utf_8(name, line)
            line = line.removeprefix(_MARK_OF_UTF_8)
        if len(line) == _LONGEST_LINE:
            raise FewShotError(
                f"{_IMAGES}: line {number} of {name} is longer than a path can be; it must be a "
                "text file with a path on each line"
            )
        if text := os.fsdecode(line).rstrip("\r\n"):
            yield text


def _column(name: str, file: BinaryIO) -> Iterator[Image | str]:
    start = file.readline(_LONGEST_LINE)
    _require_utf_8(name, start)
    file.seek(0)
    first = os.fsdecode(start.removeprefix(_MARK_OF_UTF_8))
    delimiter = find_delimiter(first)
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    # Strict, since a quote that is never closed would make one cell of all that follows.
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        at = _position(header)
        if at is None and len(header) > 1:
            raise FewShotError(
                f"{_IMAGES}: {name} has no column of paths: its first line must name one of "
                f"{', '.join(_COLUMNS)}; it names {', '.join(header)}"
            )
        if at is None and header:  # a list of paths without a header
            yield header[0]
        for row in rows:
            if not any(row):
                continue
            cell = row[at or 0] if len(row) > (at or 0) else ""
            where = f"line {rows.line_num} of {name}"
            yield cell or Image(where, ValueError("it has no path"))
    except csv.Error as error:
        raise FewShotError(f"{_IMAGES}: line {rows.line_num} of {name}: {error}") from error
    finally:
        text.detach()  # who opened the file closes it


def _position(header: list[str]) -> int | None:
    names = [re.sub(r"[\s_-]", "", cell).lower() for cell in header]
    return next((names.index(each) for each in _COLUMNS if each in names), None)


def _require_utf_8(name: str, start: bytes) -> None:
    if start.startswith(_MARKS_OF_UTF_16) or b"\0" in start:
        raise FewShotError(
            f"{_IMAGES}: {name} is not UTF-8 text with a path on each line; save it as UTF-8"
        )
