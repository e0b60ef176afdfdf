"""A run's folder: its settings, its journals, and the processes in it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tir_kernels.fewshot.errors import FewShotError, first_line
from tir_kernels.fewshot.journal import (
    Journal,
    JournalReader,
    Record,
    journal_name,
    journal_paths,
    sync_folder,
)
from tir_kernels.fewshot.workers import Place, RunLock

SETTINGS_NAME = "settings.json"
SUMMARY_NAME = "summary.json"
LOCK_NAME = ".lock"


def read_run(folder: str | Path) -> list[Record]:
    """The records of a run, from all its journals, by episode and in the order of its methods.

    They can be read while the run goes on. Each (episode, method) is there once.

    Args:
        folder: The run's folder.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    folder = Path(folder).expanduser()
    reader = JournalReader(folder)
    records = reader.news()
    settings_path = folder / SETTINGS_NAME
    methods: list[str] = []
    if settings_path.exists():
        methods = _read_settings(settings_path)["settings"].get("method", [])
    order = {method: position for position, method in enumerate(methods)}
    return sorted(
        records,
        key=lambda record: (record.episode, order.get(record.method, len(order)), record.method),
    )


class RunFolder:
    """A run's folder, held by one process or by those that share the run.

    Args:
        path: The folder; it is created if missing.
        place: Which of the run's processes this is; ``None``: the only one.

    Attributes:
        path: The folder.
        place: This process.

    Raises:
        FewShotError: It can't be created or locked, or another run holds it.
    """

    def __init__(self, path: str | Path, place: Place | None = None) -> None:
        self.path = Path(path).expanduser()
        self.place = place or Place.of_this_process()
        self._lock = RunLock(self.path / LOCK_NAME, self.place)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        new = json.loads(json.dumps({"episodes": episodes, "settings": dict(settings)}))
        with self._lock.door():
            self._record_settings(new, dict(about))

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        """The run's journal, with a file of its own that this process appends to."""
        journal = Journal(self.path / journal_name(self._lock.journal_number()))
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
            _refuse_changes(self.path, old, new)
            if old["episodes"] == new["episodes"]:
                return
            about = old.get("about", about)
        elif journals := journal_paths(self.path):
            raise FewShotError(
                f"--out: {self.path} has {journals[0].name} but no {SETTINGS_NAME}, so it can't be "
                "continued; choose another folder"
            )
        write_json(path, {**new, "about": about})


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_bytes())
        if isinstance(old["settings"], dict) and isinstance(old["episodes"], int):
            return old
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error
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
        sync_folder(path.parent)
    except OSError as error:
        raise FewShotError(f"can't write {path}: {first_line(error)}") from error
