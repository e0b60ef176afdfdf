"""The journal of finished episodes: one file for each process that shares the run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path

from tir_kernels.fewshot.errors import FewShotError, first_line

OK = "ok"


@dataclass(frozen=True)
class Record:
    """One finished (episode, method): a line of the journal.

    Args:
        episode: The episode's number.
        method: The method's name.
        classes: Folder names of the episode's classes.
        correct: Queries answered correctly; ``None`` unless the status is "ok".
        total: Queries.
        accuracy: ``correct / total``; ``None`` unless the status is "ok".
        final_loss: Loss of the last step; ``None`` without one, or if it was not finite.
        seconds: Time of training and evaluation.
        status: "ok", or why there is no result.
        seconds_per_step: Of training alone; ``None`` without training.
        support_accuracy: On the support images, after training.
        skipped: Unreadable images that others replaced.
    """

    episode: int
    method: str
    classes: tuple[str, ...]
    correct: int | None
    total: int
    accuracy: float | None
    final_loss: float | None
    seconds: float
    status: str
    seconds_per_step: float | None = None
    support_accuracy: float | None = None
    skipped: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[int, str]:
        """What a journal holds at most once."""
        return self.episode, self.method

    def to_line(self) -> bytes:
        """The record as a line of JSON."""
        text = json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)
        return text.encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Parse a line. Keys that are not known are ignored.

        Raises:
            ValueError: The line is not a record; the text says why.
        """
        values = json.loads(line.decode(), parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        for name, types in _FIELD_TYPES.items():
            if name not in values:
                if name in _OPTIONAL:
                    continue
                raise ValueError(f"no {name!r}")
            value = values[name]
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(f"{name!r} is {value!r}")
        if values["status"] == OK and (values["correct"] is None or values["accuracy"] is None):
            raise ValueError("status 'ok' without a result")
        known = {name: values[name] for name in _FIELD_TYPES if name in values}
        for name in ("classes", "skipped"):
            known[name] = tuple(known.get(name, ()))
        return cls(**known)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_NUMBER = (int, float)
_MAYBE_NUMBER = (int, float, type(None))
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "episode": (int,),
    "method": (str,),
    "classes": (list,),
    "correct": (int, type(None)),
    "total": (int,),
    "accuracy": _MAYBE_NUMBER,
    "final_loss": _MAYBE_NUMBER,
    "seconds": _NUMBER,
    "status": (str,),
    "seconds_per_step": _MAYBE_NUMBER,
    "support_accuracy": _MAYBE_NUMBER,
    "skipped": (list,),
}
_OPTIONAL = {"seconds_per_step", "support_accuracy", "skipped"}
assert set(_FIELD_TYPES) == {field.name for field in fields(Record)}


def read_journal(path: str | Path) -> list[Record]:
    """The records of one journal file, in order; a torn last line is left out, repeats count once.

    Raises:
        FewShotError: The file can't be read, or a whole line of it is not a record.
    """
    path = Path(path)
    records: dict[tuple[int, str], Record] = {}
    for record in _parse(path, _whole_lines(_read_bytes(path)), lines_before=0):
        records.setdefault(record.key, record)
    return list(records.values())


def journal_name(number: int) -> str:
    """The name of the journal of this number; a process that runs alone has number 0."""
    return f"episodes.{number}.jsonl" if number else "episodes.jsonl"


def journal_paths(folder: Path) -> list[Path]:
    """The journals in a folder, by number.

    Raises:
        FewShotError: The folder can't be read.
    """
    try:
        names = [name for name in os.listdir(folder) if fnmatch(name, "episodes*.jsonl")]
    except OSError as error:
        raise FewShotError(f"can't read {folder}: {first_line(error)}") from error
    return [folder / name for name in sorted(names, key=lambda name: (len(name), name))]


def _read_bytes(path: Path, start: int = 0) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read()
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error


def _whole_lines(content: bytes) -> bytes:
    # What follows the last line feed is torn: its process was killed, or is in the midst of it.
    return content[: content.rfind(b"\n") + 1]


def _parse(path: Path, content: bytes, lines_before: int) -> list[Record]:
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=lines_before + 1):
        try:
            records.append(Record.from_line(line))
        except (ValueError, RecursionError) as error:
            raise FewShotError(
                f"line {number} of {path} is damaged ({first_line(error)}); delete that line and "
                "its episode is run again"
            ) from error
    return records


class JournalReader:
    """The records of a run, merged from all its journals while these grow.

    Args:
        folder: The run's folder.

    Attributes:
        repeats: Lines that were left out because their (episode, method) was there already.
    """

    def __init__(self, folder: Path) -> None:
        self.repeats = 0
        self._folder = folder
        self._done: dict[Path, tuple[int, int]] = {}  # bytes and lines read
        self._records: dict[tuple[int, str], Record] = {}

    def news(self) -> list[Record]:
        """The records that no earlier call returned.

        Raises:
            FewShotError: A journal can't be read, or a whole line of it is not a record.
        """
        found = []
        for path in journal_paths(self._folder):
            size, lines = self._done.get(path, (0, 0))
            content = _whole_lines(_read_bytes(path, size))
            records = _parse(path, content, lines)
            self._done[path] = size + len(content), lines + len(records)
            for record in records:
                if record.key in self._records:
                    self.repeats += 1
                else:
                    self._records[record.key] = record
                    found.append(record)
        return found

    @property
    def records(self) -> list[Record]:
        """All records that were read."""
        return list(self._records.values())

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._records


class Journal(JournalReader):
    """The records of a run, and the file that this process appends its own to.

    The file is safe against being killed at any moment.

    Args:
        path: The file, which no other process may append to; it is created if missing, and a torn
            last line is cut off.

    Attributes:
        note: What was repaired, or empty.

    Raises:
        FewShotError: A journal can't be read or written, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self.path = path
        self.note = ""
        self.news()
        content = _read_bytes(path) if path.exists() else b""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            whole = len(_whole_lines(content))
            if whole < len(content):
                os.ftruncate(self._file, whole)
                self.note = f"the last line of {path} was torn; its episode is run again"
            sync_folder(path.parent)
        except OSError as error:
            raise FewShotError(f"can't write {path}: {first_line(error)}") from error

    def append(self, record: Record) -> None:
        """Write a record; when this returns, the record is on the disk, and ``news`` will have it.

        Raises:
            FewShotError: It can't be written. The records before it stay readable.
        """
        size = os.fstat(self._file).st_size
        rest = record.to_line()
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise FewShotError(
                f"can't write {self.path}: {first_line(error)}; what is finished is kept: "
                "make room and give the same command again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, once they are there."""
    # Some network file systems don't offer this for folders; there it is left to them.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def skipped_images(records: Sequence[Record]) -> list[str]:
    """All unreadable images that the records name, sorted."""
    return sorted({name for record in records for name in record.skipped})
