"""A run's folder: its settings, its journals, and the processes in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.changes import changes
from tir_kernels.fewshot.run.appended import sync_folder
from tir_kernels.fewshot.run.journal import Journal, JournalReader, journal_name, journal_paths
from tir_kernels.fewshot.run.lock import GROUP_KINDS, RunLock
from tir_kernels.fewshot.run.records import Record, RunShape
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.settings import ALL
from tir_kernels.fewshot.strict_json import decode_json, encode_json
from tir_kernels.files import MIB, expand_user, read_bytes
from tir_kernels.text import setting

_OUT = setting("out")

SETTINGS_NAME = "settings.json"
SUMMARY_NAME = "summary.json"
ABLATION_NAME = "ablation.json"
LOCK_NAME = ".lock"

_LARGEST_JSON = 64 * MIB
# What a summary of ours holds.
_SUMMARY_KEYS = {"differences", "skipped_images"}
_ABLATION_KEYS = {"baseline", "accuracy", "changes"}


def read_run(folder: str | Path) -> list[Record]:
    """The records of a run, from all its journals, by episode and in the order of its arms.

    They can be read while the run goes on. Each (episode, arm) is there once.

    Args:
        folder: The run's folder.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    return read_journals(folder)[0]


def read_journals(folder: str | Path) -> tuple[list[Record], JournalReader]:
    """What ``read_run`` gives, and the reader that knows which journal a record lies in."""
    folder = expanded_out(folder)
    reader = JournalReader(folder)
    records = reader.news()
    settings_path = folder / SETTINGS_NAME
    if not settings_path.exists():
        return _sorted(records, ()), reader
    # Read after the journals: a run may be continued with more episodes, never with fewer.
    shape = _shape(_read_settings(settings_path))
    reader.require(shape)
    return _sorted(records, shape.arms or ()), reader


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The content of a run's ``settings.json``: "episodes", "settings" and "about".

    Args:
        folder: The run's folder.

    Raises:
        FewShotError: It can't be read, or is not of a run.
    """
    return _read_settings(expanded_out(folder) / SETTINGS_NAME)


def is_read_only(folder: str | Path) -> bool:
    """Whether a folder holds a run that can be looked at but not continued."""
    path = expanded_out(folder)
    return (path / SETTINGS_NAME).exists() and not os.access(path, os.W_OK)


def finished_records(
    folder: str | Path, settings: Mapping[str, Any], episodes: int
) -> list[Record]:
    """The records of a run of which nothing is left to do; nothing is written.

    Args:
        folder, settings, episodes: As for ``RunFolder.claim``.

    Raises:
        FewShotError: The folder belongs to a run with other settings, can't be read, or the run is
            not finished.
    """
    path = expanded_out(folder)
    new = _as_json(settings, episodes)
    _refuse_changes(path, _read_settings(path / SETTINGS_NAME), new)
    records = read_run(path)
    left = episodes * len(_shape(new).arms or ()) - len(records)
    if left > 0:
        raise FewShotError(
            f"{_OUT}: can't write in {path}, and {left} results of the run are not there yet; make "
            "the folder writable, or choose another"
        )
    return records


def expanded_out(folder: str | Path) -> Path:
    """The path of a run's folder, with the user's home in place of ``~``.

    Raises:
        FewShotError: It is empty, which would be the current folder, or there is no home.
    """
    if not str(folder).strip():
        raise FewShotError(f"{_OUT} is empty; name a folder, or . for the current one")
    try:
        return expand_user(folder)
    except OSError as error:
        raise FewShotError(
            f"{setting('out', folder)}: {first_line(error)}; name it in full"
        ) from error


def _sorted(records: Iterable[Record], arms: Sequence[str]) -> list[Record]:
    order = {arm: position for position, arm in enumerate(arms)}
    return sorted(
        records,
        key=lambda record: (record.episode, order.get(record.arm, len(order)), record.arm),
    )


class RunFolder:
    """A run's folder, held by one process or by those that share the run.

    Args:
        path: The folder; it is created if missing.
        place: Place of this process among the run's; ``None``: it is the only one.
        kind: What the folder holds, in words.

    Attributes:
        path: The folder.
        place: This process.

    Raises:
        FewShotError: It can't be created or locked, another run holds it, or what has the name of
            one of a run's files was not written by one.
    """

    def __init__(self, path: str | Path, place: Place | None = None, kind: str = "run") -> None:
        self.path = expanded_out(path)
        self._kind = kind
        self.place = place or Place.of_this_process()
        self._shape: RunShape | None = None
        _refuse_others_files(self.path)
        self._lock = RunLock(self.path / LOCK_NAME, self.place)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def claim(self, settings: Mapping[str, Any], episodes: int, about: Mapping[str, Any]) -> None:
        """Record what the run is, or check that it is still the same.

        Args:
            settings: All that decides an episode's numbers, as JSON values, by the options' names.
            episodes: Number of episodes; it may be larger each time.
            about: Facts worth keeping that are not compared.

        Raises:
            FewShotError: The folder belongs to a run with other settings, or can't be read.
        """
        new = _as_json(settings, episodes)
        with self._lock.door():
            self._record_settings(new, dict(about))
        self._shape = _shape(new)

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        """The run's journal, with a file of its own that this process appends to."""
        journal = Journal(self.path / journal_name(self._lock.journal_number()), self._shape)
        try:
            yield journal
        finally:
            journal.close()

    def episodes(
        self, candidates: Iterable[int], at_most: int
    ) -> contextlib.AbstractContextManager[list[int]]:
        """Hold the first of the candidates that no other process holds; there may be none."""
        return self._lock.episodes(candidates, at_most)

    def _record_settings(self, new: Mapping[str, Any], about: dict[str, Any]) -> None:
        path = self.path / SETTINGS_NAME
        if path.exists():
            old = _read_settings(path)
            _refuse_changes(self.path, old, new, self._kind)
            if old["episodes"] == new["episodes"]:
                return
            about = old.get("about", about)
        elif journals := journal_paths(self.path):
            raise FewShotError(
                f"{_OUT}: {self.path} has {journals[0].name} but no {SETTINGS_NAME}, so it "
                "can't be "
                "continued; choose another folder"
            )
        write_json(path, {**new, "about": about})


def _refuse_others_files(folder: Path) -> None:
    """Refuse a folder in which something of another program's would be replaced or written to."""
    try:
        names = [LOCK_NAME, SETTINGS_NAME, SUMMARY_NAME, ABLATION_NAME]
        journals = [path.name for path in journal_paths(folder)] if folder.is_dir() else []
        names += [*journals, *map(tracked_name, journals)]
        kinds = {name: _kind(folder / name) for name in names}
    except (OSError, ValueError) as error:
        raise FewShotError(f"{_OUT}: can't read {folder}: {first_line(error)}") from error
    for name, kind in kinds.items():
        if kind is not None and not stat.S_ISREG(kind):
            raise FewShotError(
                f"{_OUT}: {folder / name} is not a file of a run but "
                f"{'a link' if stat.S_ISLNK(kind) else 'something else'}; choose another folder"
            )
    if kinds[SETTINGS_NAME] is not None:
        _read_settings(folder / SETTINGS_NAME)
    checks = {SUMMARY_NAME: _is_summary, ABLATION_NAME: _is_ablation, LOCK_NAME: _is_lock}
    for name, is_ours in checks.items():
        if kinds[name] is not None and not is_ours(folder / name):
            raise FewShotError(
                f"{_OUT}: {folder / name} was not written by a run; choose another folder, or move "
                "that file"
            )


def _kind(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_summary(path: Path) -> bool:
    return _has_keys(path, _SUMMARY_KEYS)


def _is_ablation(path: Path) -> bool:
    return _has_keys(path, _ABLATION_KEYS)


def _has_keys(path: Path, keys: set[str]) -> bool:
    try:
        content = decode_json(read_bytes(path, at_most=_LARGEST_JSON))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= keys


def _is_lock(path: Path) -> bool:
    try:
        name = read_bytes(path, at_most=MIB).decode()
    except (OSError, ValueError):
        return False
    return name.startswith(GROUP_KINDS) or name == ""  # of a process that was killed at once


def _as_json(settings: Mapping[str, Any], episodes: int) -> dict[str, Any]:
    return json.loads(json.dumps({"episodes": episodes, "settings": dict(settings)}))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = read_bytes(path, at_most=_LARGEST_JSON)
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error
    try:
        old = decode_json(content)
        _shape(old)
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise FewShotError(
            f"{_OUT}: {path} is damaged, or not of a run ({reason}); choose another folder"
        ) from error
    return old


def _shape(settings: Any) -> RunShape:
    """The shape of a run with these settings.

    Raises:
        KeyError, TypeError, ValueError: They are not those of a run.
    """
    if not isinstance(settings, dict) or not isinstance(settings["settings"], dict):
        raise TypeError("'settings' is not an object")
    episodes, own = settings["episodes"], settings["settings"]
    if type(episodes) is not int or episodes < 1:
        raise ValueError(f"'episodes' is {episodes!r}")
    arms = own.get("arms", own.get("method"))  # a list before there were arms
    if isinstance(arms, dict) and all(isinstance(each, dict) for each in arms.values()):
        arms = list(arms)
    if arms is not None and not (
        isinstance(arms, list) and all(isinstance(arm, str) for arm in arms)
    ):
        raise TypeError(f"'arms' is {arms!r}")
    counts = [None if own.get(name) == ALL else own.get(name) for name in ("ways", "queries")]
    for count in counts:
        if count is not None and (type(count) is not int or count < 1):
            raise ValueError(f"'ways' or 'queries' is {count!r}")
    return RunShape(episodes, None if arms is None else tuple(arms), *counts)


def _refuse_changes(
    folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], kind: str = "run"
) -> None:
    found = changes(_flat(old["settings"]), _flat(new["settings"]), named=str)
    if found:
        raise FewShotError(
            f"{_OUT}: {folder} holds a {kind} with other settings: {found}; give the old values to "
            "continue it, or choose another folder"
        )
    if new["episodes"] < old["episodes"]:
        raise FewShotError(
            f"{_OUT}: {folder} holds a run of {old['episodes']} episodes; {setting('episodes')} "
            "may grow but "
            f"not shrink to {new['episodes']}"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their marked names; one that arms do not share has the arm's name behind it."""
    arms = settings.get("arms", {})
    flat = {setting(name): value for name, value in settings.items() if name != "arms"}
    if arms:
        flat[setting("method")] = list(arms)
    owners: dict[str, list[str]] = {}
    for arm, options in arms.items():
        for name in options:
            owners.setdefault(name, []).append(arm)
    for name, named in owners.items():
        values = [arms[arm][name] for arm in named]
        if name == "method":
            flat |= {
                f"{setting(name)} of {arm}": arms[arm][name]
                for arm in named
                if arms[arm][name] != arm
            }
        elif all(value == values[0] for value in values):
            flat[setting(name)] = values[0]
        else:
            flat |= {f"{setting(name)} of {arm}": arms[arm][name] for arm in named}
    return flat


def tracked_name(journal: str) -> str:
    """The name of the file of measures beside a journal: ``tracked.2.jsonl``."""
    return re.sub("^episodes", "tracked", journal)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON as ``write_whole`` does."""
    write_whole(path, encode_json(content, indent=2) + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        FewShotError: The file can't be written.
    """
    # A name of this process's own, which is never opened if it is there: a link would lead away.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()  # of a killed process that had this number
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise FewShotError(f"can't write {path}: {first_line(error)}") from error
