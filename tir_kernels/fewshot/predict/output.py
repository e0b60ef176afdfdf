"""Where predictions go: a CSV or Parquet file a process, which the same command goes on with."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.predict import parquet
from tir_kernels.fewshot.predict.rows import (
    Columns,
    KnownNames,
    Row,
    RowFile,
    as_csv,
    read_rows,
    written,
)
from tir_kernels.fewshot.run.folder import expanded_out, write_json
from tir_kernels.fewshot.run.lock import RunLock
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.strict_json import decode_json
from tir_kernels.files import MIB, read_bytes
from tir_kernels.text import setting

CSV, PARQUET = ".csv", ".parquet"
_OUT = setting("out")


class Output(Protocol):
    """Takes predictions."""

    def is_known(self, name: str) -> bool:
        """Whether an image has its row from an earlier run."""

    def write(self, rows: Sequence[Row]) -> None:
        """Write rows of images."""

    def skip(self, name: str, reason: str) -> None:
        """Note an image that can't be read."""


class Printed:
    """Predictions as CSV on standard output, of which nothing is known afterwards."""

    def __init__(self, columns: Columns) -> None:
        self._print(as_csv([columns.header]))

    def is_known(self, name: str) -> bool:
        """Never."""
        return False

    def write(self, rows: Sequence[Row]) -> None:
        """Print rows.

        Raises:
            FewShotError: Nobody reads them.
        """
        self._print(as_csv(rows))

    def skip(self, name: str, reason: str) -> None:
        """Nothing: it is told at the end."""

    def _print(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        if failure := getattr(sys.stdout, "failure", ""):
            raise FewShotError(f"standard output can't be written: {failure}")


class Files:
    """Predictions in files, held by one process or by those that ``torchrun`` started.

    Of several processes, each has a part of its own, with its number in front of the ending. Beside
    them lie hidden files: the lock, the settings, and until all is done a Parquet file's rows.

    Args:
        path: The file, which ends in .csv or .parquet.
        columns: What is written.
        place: This process.

    Attributes:
        unreadable: The list of images that can't be read, of this run alone.
    """

    def __init__(self, path: Path, columns: Columns, place: Place) -> None:
        self._path = path
        self._columns = columns
        self._place = place
        self._stack = ExitStack()
        self._known = KnownNames([])
        self.is_parquet = path.suffix.lower() == PARQUET
        self.unreadable = self._part(place).with_suffix(".unreadable.csv")
        self._rows: RowFile
        self._listed: RowFile | None = None

    @contextlib.contextmanager
    def open(self, settings: Mapping[str, Any]) -> Iterator[Files]:
        """Hold the files, and go on with what is in them.

        Args:
            settings: All that decides a row, as JSON values, by the options' names.

        Raises:
            FewShotError: Another process holds them, they can't be written or read, or they hold
                rows of other settings.
        """
        _require_file(self._path)
        lock = RunLock(self._hidden(self._path, "lock"), self._place)
        with contextlib.closing(lock):
            with lock.door():
                self._claim(settings)
            own = self._own_parts()
            with ExitStack() as stack:
                # Rows that move into a Parquet file meanwhile would be read twice, or not at all.
                with lock.door() if self.is_parquet else contextlib.nullcontext():
                    for part in own[1:]:  # of processes that are no more
                        self._continued(part).close()
                    self._rows = stack.enter_context(contextlib.closing(self._continued(own[0])))
                    self._known = KnownNames(row[0] for row in self.read())
                self.unreadable.unlink(missing_ok=True)
                self._stack = stack
                yield self
            if self.is_parquet:
                with lock.door():
                    for part in own:
                        parquet.finish(self._rows_of(part), part, self._columns)

    @property
    def count(self) -> int:
        """How many images had their rows before this run."""
        return len(self._known)

    def is_known(self, name: str) -> bool:
        """Whether an image has its row from an earlier run."""
        return self._known.take(written(name, is_exact=self.is_parquet))

    def write(self, rows: Sequence[Row]) -> None:
        """Append rows, see ``RowFile.append``."""
        self._rows.append(rows)

    def skip(self, name: str, reason: str) -> None:
        """Add an image to the list of those that can't be read."""
        if self._listed is None:
            listed = RowFile(self.unreadable, ["image", "reason"])
            self._listed = self._stack.enter_context(contextlib.closing(listed))
        self._listed.append([[name, reason]])

    def read(self) -> Iterator[list[str]]:
        """The rows of all parts, without their headers."""
        for part in self._parts():
            if self.is_parquet and part.exists():
                yield from parquet.rows(part)
            if (rows := self._rows_of(part)).exists():
                yield from islice(read_rows(rows), 1, None)

    def _continued(self, part: Path) -> RowFile:
        source = self._rows_of(part)
        if self.is_parquet:
            parquet.drop_written(source, part)
        return RowFile(source, self._columns.header, is_exact=self.is_parquet)

    def _part(self, place: Place) -> Path:
        number = f".{place.rank}" if place.count > 1 else ""
        return self._path.with_suffix(f"{number}{self._path.suffix}")

    def _rows_of(self, part: Path) -> Path:
        """The file that a part's rows are appended to."""
        return self._hidden(part, "csv") if self.is_parquet else part

    @staticmethod
    def _hidden(path: Path, ending: str) -> Path:
        return path.with_name(f".{path.name}.{ending}")

    def _parts(self) -> list[Path]:
        """The parts that are there, also those of other numbers of processes."""
        ending = re.escape(self._path.suffix)
        stem = re.escape(self._path.stem)
        name = re.compile(rf"{stem}(\.\d+)?{ending}")
        hidden = re.compile(rf"\.({stem}(\.\d+)?{ending})\.csv")
        found = set()
        for each in os.listdir(self._path.parent):
            if name.fullmatch(each):
                found.add(each)
            elif self.is_parquet and (match := hidden.fullmatch(each)):
                found.add(match[1])
        return [self._path.with_name(each) for each in sorted(found)]

    def _own_parts(self) -> list[Path]:
        """This process's part; after the first's, those that belong to no process of now."""
        own = self._part(self._place)
        if not self._place.is_first:
            return [own]
        count = self._place.count
        ranks = [Place("", rank, count) for rank in range(count)]
        living = {self._part(place) for place in ranks}
        return [own, *(part for part in self._parts() if part not in living)]

    def _claim(self, settings: Mapping[str, Any]) -> None:
        place = self._hidden(self._path, "json")
        parts = self._parts()
        if not parts:
            write_json(place, settings)
            return
        if not place.exists():
            raise FewShotError(
                f"{_OUT}: {parts[0]} was not written by predict, or {place.name} beside it is "
                "missing; choose another file"
            )
        try:
            before = decode_json(read_bytes(place, at_most=MIB))
            changed = [name for name in settings if before.get(name) != settings[name]]
        except (OSError, ValueError, AttributeError) as error:
            raise FewShotError(
                f"{_OUT}: {place} can't be used: {first_line(error)}; choose another file"
            ) from error
        if changed:
            words = "; ".join(
                f"{setting(name)} was {_shown(before.get(name))}, is {_shown(settings[name])}"
                for name in changed
            )
            raise FewShotError(
                f"{_OUT}: {parts[0]} holds predictions with other settings: {words}; give the old "
                "values to continue it, or choose another file"
            )


def out_path(out: str) -> Path:
    """The path of an output file.

    Raises:
        FewShotError: It ends in neither .csv nor .parquet, or the library for Parquet is missing.
    """
    path = expanded_out(out)
    if path.suffix.lower() not in (CSV, PARQUET):
        raise FewShotError(f"{_OUT}: {out} must end in {CSV} or {PARQUET}")
    if path.suffix.lower() == PARQUET:
        parquet.require()
    return path


def _require_file(path: Path) -> None:
    """Refuse what is in the way, and make the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FewShotError(f"{_OUT}: can't write {path}: {first_line(error)}") from error
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FewShotError(f"{_OUT}: {path} is not a regular file; choose another name")


def _shown(value: object) -> str:
    return "unset" if value is None else str(value)
