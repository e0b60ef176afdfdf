"""Reading the files that a user names: regular ones only, and no more of them than was meant."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MIB = 2**20


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; a pipe, device or folder is refused and never waited for.

    Raises:
        OSError: The file can't be opened, or is not a regular one.
    """
    try:
        # Opening a pipe would otherwise wait until somebody writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # a NUL byte in the name
        raise OSError(errno.EINVAL, f"not the name of a file ({error})", str(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        os.set_blocking(descriptor, True)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, *, at_most: int) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        at_most: Bytes it may have.

    Raises:
        OSError: The file can't be read, is not a regular one, or is larger.
    """
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        limit = f"{at_most // MIB} MiB" if at_most >= MIB else f"{at_most} bytes"
        raise OSError(errno.EFBIG, f"larger than {limit}, the most such a file may have", str(path))
    return content


def read_text(path: str | Path, *, at_most: int) -> str:
    """The content of a regular UTF-8 file, without its byte order mark.

    Args:
        path: The file.
        at_most: Bytes it may have.

    Raises:
        OSError: As ``read_bytes``.
        ValueError: It is not UTF-8.
    """
    try:
        return read_bytes(path, at_most=at_most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from error


def expand_user(path: str | Path) -> Path:
    """A path with the user's home folder in place of a leading ``~``.

    ``~name`` of nobody on this machine stays as it is: a file may be called so.

    Raises:
        OSError: There is no home folder, as for an unknown user in a container.
    """
    expanded = os.path.expanduser(path)
    if expanded == "~" or expanded.startswith("~/"):
        raise OSError(errno.ENOENT, "no home folder is known to put in place of ~", str(path))
    return Path(expanded)
