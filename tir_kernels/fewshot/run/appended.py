"""Files of lines that one process appends to, safe against being killed at any moment."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import open_regular


def read_from(path: Path, start: int = 0) -> bytes:
    """The content of a regular file from a byte on.

    Raises:
        FewShotError: It can't be read.
    """
    try:
        with open_regular(path) as file:
            file.seek(start)
            return file.read()
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error


def whole_lines(content: bytes) -> bytes:
    """The lines that are complete.

    What follows the last line feed is torn: its process was killed, or is in the midst of it.
    """
    return content[: content.rfind(b"\n") + 1]


def lost(path: Path, what: str) -> FewShotError:
    """The error of a file of the run that another program touched."""
    return FewShotError(
        f"{path} was {what} by another program while the run was on; keep clean-up jobs, editors "
        "and programs that synchronise folders away from it, and give the same command again"
    )


class AppendedLines:
    """A file that this process alone appends lines to.

    Args:
        path: The file; it is created if missing, and a torn last line is cut off.

    Attributes:
        was_torn: Whether there was such a line.

    Raises:
        FewShotError: It can't be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        content = read_from(path) if path.exists() else b""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags, 0o644)
            self._size = len(whole_lines(content))
            self.was_torn = self._size < len(content)
            if self.was_torn:
                os.ftruncate(self._file, self._size)
            sync_folder(path.parent)
        except OSError as error:
            raise FewShotError(f"can't write {path}: {first_line(error)}") from error

    @property
    def is_open(self) -> bool:
        """Whether lines can be appended."""
        return self._file >= 0

    def append(self, line: bytes) -> None:
        """Write a line, its line feed included; when this returns, it is on the disk.

        Raises:
            FewShotError: It can't be written, or the file is not the one in the run's folder any
                more. The lines before it stay readable.
        """
        self.require_own_file()
        rest = line
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise FewShotError(
                f"can't write {self.path}: {first_line(error)}; what is finished is kept: "
                "make room and give the same command again"
            ) from error
        self._size += len(line)
        # What was written into a file that meanwhile lost its name is nowhere.
        self.require_own_file()

    def require_own_file(self) -> None:
        """Check that what this process appends to is the file of that name, as it left it.

        Raises:
            FewShotError: It was removed, replaced or changed.
        """
        own = os.fstat(self._file)
        try:
            named = os.stat(self.path, follow_symlinks=False)
        except OSError as error:
            raise lost(self.path, "removed") from error
        if not os.path.samestat(own, named):
            raise lost(self.path, "replaced")
        if own.st_size != self._size:
            raise lost(self.path, "cut short" if own.st_size < self._size else "written to")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        self._file = -1


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, once they are there."""
    # Some network file systems don't offer this for folders; there it is left to them.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
