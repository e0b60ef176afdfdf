"""The lock file of a run's folder: which process is in it, and which of them runs which episode."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.text import setting

_OUT = setting("out")

# Positions in the lock file. The journals' and the episodes' go on from there.
_DOOR, _MEMBERS, _JOURNALS, _EPISODES = 0, 1, 1000, 2**32

# How the names of groups begin, by which the lock file of a run is known.
GROUP_KINDS = ("process ", "torchrun ")

_FIRST_SECONDS = 300
_LOOK_SECONDS = 0.2


class RunLock:
    """The lock file of a run's folder.

    The file holds the name of the group that is in the folder, or was the last: rank 0 writes it,
    and the others wait for it. The rest are POSIX locks on its bytes, most of which are not there
    and need not be:

    - the door: held for a moment by who enters, looks around, or writes the settings;
    - the members: shared by all processes of the group, so that it is free when none is left;
    - a journal's: held by the one process that appends to it;
    - an episode's: held by the process that runs it.

    An episode is handed out by taking its lock. Nobody keeps a list or a counter that could be
    wrong: the system drops a process's locks when the process ends, however it ends, on other
    machines too, and what it left is free for the others, for those that ``torchrun`` starts in
    its place, or for the next run.

    Such locks belong to the process: they do not tell apart two users within it, and closing the
    file anywhere in the process drops them. So it is opened here only.

    Args:
        path: The file. Rank 0 creates it and its folder; the others wait for that.
        place: This process.
        patience: Seconds to wait for rank 0.

    Raises:
        FewShotError: The file can't be written or locked, another group is in the folder, or rank 0
            does not appear in it.
    """

    def __init__(self, path: Path, place: Place, *, patience: float = _FIRST_SECONDS) -> None:
        self._path = path
        self._place = place
        deadline = time.monotonic() + patience
        try:
            if place.is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
            else:
                self._wait_for_file(deadline)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(path, flags, 0o644)
        except (OSError, ValueError) as error:
            raise FewShotError(
                f"{_OUT}: can't write in {path.parent}: {first_line(error)}; choose another folder"
            ) from error
        try:
            if place.is_first:
                self._enter_first()
            else:
                self._follow(deadline)
        except OSError as error:  # a full disk
            self.close()
            raise FewShotError(
                f"{_OUT}: can't write in {path.parent}: {first_line(error)}; choose another folder"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave the folder: all locks of this process are free."""
        os.close(self._file)

    @contextlib.contextmanager
    def door(self) -> Iterator[None]:
        """Keep the other processes from entering, and from this, meanwhile."""
        self._call(fcntl.LOCK_EX, _DOOR)
        try:
            yield
        finally:
            self._call(fcntl.LOCK_UN, _DOOR)

    def journal_number(self) -> int:
        """Take a journal that no living process appends to: that of this rank, if it is free."""
        numbers = itertools.count(self._place.rank, self._place.count)
        return next(number for number in numbers if self._take(_JOURNALS + number))

    @contextlib.contextmanager
    def episodes(self, candidates: Iterable[int], at_most: int) -> Iterator[list[int]]:
        """Hold the first of the candidates that no other process holds; there may be none.

        Raises:
            FewShotError: The file is not the one in the folder any more, so that locks on it keep
                nobody out.
        """
        self._require_own_file()
        taken: list[int] = []
        try:
            for index in candidates:
                if len(taken) == at_most:
                    break
                if self._take(_EPISODES + index):
                    taken.append(index)
            yield taken
        finally:
            for index in taken:
                self._call(fcntl.LOCK_UN, _EPISODES + index)

    def _require_own_file(self) -> None:
        try:
            is_own = os.path.samestat(
                os.fstat(self._file), os.stat(self._path, follow_symlinks=False)
            )
        except OSError:
            is_own = False
        if not is_own:
            raise FewShotError(
                f"{self._path} was removed or replaced by another program while the run was on; "
                "keep clean-up jobs and programs that synchronise folders away from it, and give "
                "the same command again"
            )

    def _enter_first(self) -> None:
        name = self._place.group.encode()
        with self.door():
            if self._take(_MEMBERS):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, name, 0)
            elif self._group() != self._place.group:
                raise FewShotError(
                    f"{_OUT}: another process is running in {self._path.parent} "
                    f"({self._group()}); wait for it, or choose another folder"
                )
            self._call(fcntl.LOCK_SH, _MEMBERS)

    def _wait_for_file(self, deadline: float) -> None:
        while not self._path.exists():
            self._pause(deadline)

    def _follow(self, deadline: float) -> None:
        while True:
            with self.door():
                if self._group() == self._place.group:
                    self._call(fcntl.LOCK_SH, _MEMBERS)
                    return
            self._pause(deadline)

    def _pause(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise FewShotError(
                f"{_OUT}: the first of the {self._place.count} processes did not come to "
                f"{self._path.parent}; choose a folder that all machines share"
            )
        time.sleep(_LOOK_SECONDS)

    def _group(self) -> str:
        return os.pread(self._file, 1000, 0).decode(errors="replace")

    def _take(self, position: int) -> bool:
        try:
            self._call(fcntl.LOCK_EX | fcntl.LOCK_NB, position)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _call(self, operation: int, position: int) -> None:
        try:
            fcntl.lockf(self._file, operation, 1, position)
        except (BlockingIOError, PermissionError):
            raise
        except OSError as error:
            raise FewShotError(
                f"{_OUT}: can't lock {self._path}: {first_line(error)}; choose a folder on a disk "
                "that supports locks"
            ) from error
