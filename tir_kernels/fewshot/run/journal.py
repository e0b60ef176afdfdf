"""The journal of finished episodes: one file for each process that shares the run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.appended import AppendedLines, lost, read_from, whole_lines
from tir_kernels.fewshot.run.records import Record, RunShape

# The names that journals are given, and no others: what a person or a program has put beside them,
# such as a backup, is not part of the run.
_NAME = re.compile(r"episodes(\.[1-9][0-9]*)?\.jsonl")


class _Line(NamedTuple):
    """The place where a record was read."""

    path: Path
    number: int
    record: Record

    def damaged(self, reason: str) -> FewShotError:
        """The error of such a line."""
        return _damaged(self.path, self.number, reason)


def _damaged(path: Path, number: int, reason: str) -> FewShotError:
    return FewShotError(
        f"line {number} of {path} is damaged ({reason}); delete that line and its episode is run "
        "again"
    )


def journal_name(number: int) -> str:
    """The name of the journal of this number; a process that runs alone has number 0."""
    return f"episodes.{number}.jsonl" if number else "episodes.jsonl"


def journal_paths(folder: Path) -> list[Path]:
    """The journals in a folder, by number.

    Raises:
        FewShotError: The folder can't be read.
    """
    try:
        names = [name for name in os.listdir(folder) if _NAME.fullmatch(name)]
    except (OSError, ValueError) as error:
        raise FewShotError(f"can't read {folder}: {first_line(error)}") from error
    return [folder / name for name in sorted(names, key=lambda name: (len(name), name))]


def _parse(path: Path, content: bytes, lines_before: int) -> list[_Line]:
    lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=lines_before + 1):
        try:
            lines.append(_Line(path, number, Record.from_line(line)))
        except ValueError as error:
            raise _damaged(path, number, first_line(error)) from error
    return lines


class _Progress(NamedTuple):
    """The part of a journal that was read, and the last bytes of it."""

    size: int = 0
    lines: int = 0
    tail: bytes = b""


_TAIL_BYTES = 1000


class JournalReader:
    """The records of a run, merged from all its journals while these grow.

    Args:
        folder: The run's folder.
        shape: Shape that the records must fit.

    Attributes:
        repeats: Lines that were left out because their (episode, arm) was there already.
    """

    def __init__(self, folder: Path, shape: RunShape | None = None) -> None:
        self.repeats = 0
        self._folder = folder
        self._shape = shape
        self._done: dict[Path, _Progress] = {}
        self._lines: dict[tuple[int, str], _Line] = {}

    def news(self) -> list[Record]:
        """The records that no earlier call returned.

        Raises:
            FewShotError: A journal can't be read, is not the file it was, or a whole line of it is
                not a record of this run.
        """
        found = []
        paths = journal_paths(self._folder)
        for path in self._done.keys() - set(paths):
            raise lost(path, "removed")
        for path in paths:
            done = self._done.get(path, _Progress())
            # Some network file systems number files anew, so a file is known by what it says.
            content = read_from(path, done.size - len(done.tail))
            if not content.startswith(done.tail):
                raise lost(path, "cut short" if len(content) < len(done.tail) else "replaced")
            whole = whole_lines(content)
            lines = _parse(path, whole[len(done.tail) :], done.lines)
            self._done[path] = _Progress(
                done.size + len(whole) - len(done.tail),
                done.lines + len(lines),
                whole[-_TAIL_BYTES:],
            )
            for line in lines:
                self._require_fitting(line)
                known = self._lines.setdefault(line.record.key, line)
                if known is line:
                    found.append(line.record)
                else:
                    self.repeats += 1
        return found

    def require(self, shape: RunShape) -> None:
        """Check that all records, read and to come, are of such a run.

        Raises:
            FewShotError: One of them is not.
        """
        self._shape = shape
        for line in self._lines.values():
            self._require_fitting(line)

    def _require_fitting(self, line: _Line) -> None:
        if self._shape is not None and (reason := self._shape.contradiction(line.record)):
            raise line.damaged(reason)

    @property
    def records(self) -> list[Record]:
        """All records that were read."""
        return [line.record for line in self._lines.values()]

    def path_of(self, key: tuple[int, str]) -> Path:
        """The journal from which a record was read."""
        return self._lines[key].path

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._lines


class Journal(JournalReader):
    """The records of a run, and the file that this process appends its own to.

    The file is safe against being killed at any moment.

    Args:
        path: The file, which no other process may append to; it is created if missing, and a torn
            last line is cut off.
        shape: Shape that the records must fit.

    Attributes:
        note: Line on a repair, or empty.

    Raises:
        FewShotError: A journal can't be read or written, or a line of it is damaged.
    """

    def __init__(self, path: Path, shape: RunShape | None = None) -> None:
        super().__init__(path.parent, shape)
        self.path = path
        super().news()
        self._lines_of_own = AppendedLines(path)
        torn = f"the last line of {path} was torn; its episode is run again"
        self.note = torn if self._lines_of_own.was_torn else ""

    def news(self) -> list[Record]:
        """The records that no earlier call returned; raises as ``append`` too."""
        if self._lines_of_own.is_open:
            self._lines_of_own.require_own_file()
        return super().news()

    def append(self, record: Record) -> None:
        """Write a record; when this returns, the record is on the disk, and ``news`` will have it.

        Raises:
            FewShotError: It can't be written, or the file is not the one in the run's folder any
                more. The records before it stay readable.
        """
        self._lines_of_own.append(record.to_line())

    def require_own_file(self) -> None:
        """Check that what this process appends to is the file of that name, as it left it.

        Raises:
            FewShotError: It was removed, replaced or changed.
        """
        self._lines_of_own.require_own_file()

    def close(self) -> None:
        """Close the file."""
        self._lines_of_own.close()
