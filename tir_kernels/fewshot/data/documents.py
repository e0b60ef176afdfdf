"""JSON files and tables that a user names, read within bounds and parsed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.strict_json import RepeatedNameError, without_repeats
from tir_kernels.files import MIB, read_text
from tir_kernels.text import setting

# Two million paths of a hundred bytes; with more, something else was named by mistake.
LIST_BYTES = 256 * MIB
# A hundred thousand classes with a sentence each.
NAMES_BYTES = 16 * MIB

# The line of a table that a row ends on, and its cells without the space around them.
Row = tuple[int, list[str]]


def read_document(path: Path, name: str, *, at_most: int) -> str:
    """The text of a UTF-8 file.

    Args:
        path: The file.
        name: Name of the setting that names the file, for messages.
        at_most: Bytes it may have.

    Raises:
        FewShotError: It can't be read, or is no text.
    """
    try:
        text = read_text(path, at_most=at_most)
    except (OSError, ValueError) as error:
        raise FewShotError(f"{setting(name)}: can't read {path}: {first_line(error)}") from error
    if "\0" in text:  # UTF-16 without its mark is valid UTF-8, but full of them
        raise FewShotError(f"{setting(name)}: {path} holds NUL characters; save it as UTF-8 text")
    return text


def parse_json(path: Path, text: str, name: str) -> Any:
    """The content of a JSON text; an object that has a key twice is refused.

    Raises:
        FewShotError: The text is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except RepeatedNameError as error:
        raise FewShotError(
            f"{setting(name)}: {path} has {error.name!r} twice; keep one of them"
        ) from error
    except ValueError as error:
        raise FewShotError(
            f"{setting(name)}: {path} is not valid JSON: {first_line(error)}"
        ) from error
    except RecursionError as error:
        raise FewShotError(f"{setting(name)}: {path} is nested too deeply") from error


def find_delimiter(text: str) -> str:
    """The comma, semicolon or tab that divides a table's first line into most columns."""
    first = next((line for line in text.splitlines() if line.strip()), "")

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader([first], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(",;\t", key=columns)


def parse_rows(path: Path, text: str, name: str, delimiter: str) -> list[Row]:
    """The rows of a table; empty lines are left out.

    Raises:
        FewShotError: The text is no such table.
    """
    # Strict, since a quote that is never closed would make one cell of all that follows.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise FewShotError(f"{setting(name)}: line {reader.line_num} of {path}: {error}") from error
    return rows
