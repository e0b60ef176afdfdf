"""A run's folder: its lock, its settings, and the journal of finished episodes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from tir_kernels.fewshot.errors import FewShotError, first_line

OK = "ok"
JOURNAL_NAME = "episodes.jsonl"
SETTINGS_NAME = "settings.json"
SUMMARY_NAME = "summary.json"
LOCK_NAME = ".lock"


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
    """The records of a journal, in order; a torn last line is left out, repeats count once.

    Raises:
        FewShotError: The file can't be read, or a whole line of it is not a record.
    """
    return _parse(Path(path), _read_bytes(Path(path)))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error


def _parse(path: Path, content: bytes) -> list[Record]:
    records: dict[tuple[int, str], Record] = {}
    # What follows the last line feed is torn: the process was killed while it wrote.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = Record.from_line(line)
        except (ValueError, RecursionError) as error:
            raise FewShotError(
                f"line {number} of {path} is damaged ({first_line(error)}); delete that line and "
                "its episode is run again"
            ) from error
        records.setdefault(record.key, record)
    return list(records.values())


class Journal:
    """An append-only file of records, safe against being killed at any moment.

    Args:
        path: The file; it is created if missing, and a torn last line is cut off.

    Attributes:
        note: What was repaired, or empty.

    Raises:
        FewShotError: The file can't be read or written, or a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note = ""
        content = _read_bytes(path) if path.exists() else b""
        self._records = {record.key: record for record in _parse(path, content)}
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.ftruncate(self._file, whole)
                self.note = f"the last line of {path} was torn; its episode is run again"
            _sync_folder(path.parent)
        except OSError as error:
            raise FewShotError(f"can't write {path}: {first_line(error)}") from error

    @property
    def records(self) -> list[Record]:
        """All records, in the order they were written."""
        return list(self._records.values())

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._records

    def append(self, record: Record) -> None:
        """Write a record; when this returns, the record is on the disk.

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
        self._records[record.key] = record

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class RunFolder:
    """A run's folder, held by one process at a time.

    Args:
        path: The folder; it is created if missing.

    Raises:
        FewShotError: It can't be created or locked, or another process holds it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        lock_path = self.path / LOCK_NAME
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FewShotError(
                f"--out: can't write in {self.path}: {first_line(error)}; choose another folder"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise FewShotError(
                f"--out: another process is running in {self.path}; wait for it, or choose "
                "another folder"
            ) from error
        except OSError as error:
            os.close(self._lock)
            raise FewShotError(
                f"--out: can't lock {lock_path}: {first_line(error)}; choose a folder on a disk "
                "that supports locks"
            ) from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._lock)

    def claim(self, settings: Mapping[str, Any], episodes: int, about: Mapping[str, Any]) -> None:
        """Record what the run is, or check that it is still the same.

        Args:
            settings: All that decides an episode's numbers, as JSON values, by the options' names.
            episodes: Number of episodes; it may be larger each time.
            about: Facts worth keeping that are not compared.

        Raises:
            FewShotError: The folder belongs to a run with other settings, or can't be read.
        """
        path = self.path / SETTINGS_NAME
        new = json.loads(json.dumps({"episodes": episodes, "settings": dict(settings)}))
        if path.exists():
            old = self._read_settings(path)
            _refuse_changes(self.path, old, new)
            if old["episodes"] == episodes:
                return
            about = old.get("about", about)
        elif (self.path / JOURNAL_NAME).exists():
            raise FewShotError(
                f"--out: {self.path} has {JOURNAL_NAME} but no {SETTINGS_NAME}, so it can't be "
                "continued; choose another folder"
            )
        write_json(path, {**new, "about": dict(about)})

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        """The run's journal, open for appending."""
        journal = Journal(self.path / JOURNAL_NAME)
        try:
            yield journal
        finally:
            journal.close()

    @staticmethod
    def _read_settings(path: Path) -> dict[str, Any]:
        try:
            old = json.loads(_read_bytes(path))
            if isinstance(old["settings"], dict) and isinstance(old["episodes"], int):
                return old
        except (ValueError, KeyError, TypeError):
            pass
        raise FewShotError(f"--out: {path} is damaged; choose another folder")


def _refuse_changes(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    before, now = old["settings"], new["settings"]
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        words = "; ".join(
            f"--{key.replace('_', '-')} was {_shown(before.get(key))}, is {_shown(now.get(key))}"
            for key in changed
        )
        raise FewShotError(
            f"--out: {folder} holds a run with other settings: {words}; give the old values to "
            "continue it, or choose another folder"
        )
    if new["episodes"] < old["episodes"]:
        raise FewShotError(
            f"--out: {folder} holds a run of {old['episodes']} episodes; --episodes may grow but "
            f"not shrink to {new['episodes']}"
        )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON so that a reader sees the old file or the new one, never a part.

    Raises:
        FewShotError: The file can't be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, allow_nan=False, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise FewShotError(f"can't write {path}: {first_line(error)}") from error


def _sync_folder(folder: Path) -> None:
    # A new name survives a power cut only once its folder is on the disk. Some network file systems
    # don't offer this for folders; there it is left to them.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def skipped_images(records: Sequence[Record]) -> list[str]:
    """All unreadable images that the records name, sorted."""
    return sorted({name for record in records for name in record.skipped})
