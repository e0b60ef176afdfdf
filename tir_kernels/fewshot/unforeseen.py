"""Errors that nobody foresaw: written whole to a file, told in one sentence."""

from __future__ import annotations

import os
import platform
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path

from tir_kernels.errors import FewShotError, first_line

_PACKAGES = ("tir_kernels", "torch", "open_clip_torch", "numpy", "pillow")


class UnforeseenError(FewShotError):
    """An error that has no sentence of its own; its text says where all about it was written."""


def describe_unforeseen(error: BaseException, folder: Path | None) -> UnforeseenError:
    """Write an exception's traceback to a new file.

    Args:
        error: The exception.
        folder: Folder of the file, if it can be written there; else, and for ``None``, it goes to
            the system's folder for temporary files.
    """
    what = f"{type(error).__name__}: {first_line(error)}"
    text = "".join(traceback.format_exception(error))
    about = f"{_versions()}\nPython {platform.python_version()}, {platform.platform()}\n\n{text}"
    name = f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for place in (folder, Path(tempfile.gettempdir())):
        path = _written(place, name, about)
        if path is not None:
            return UnforeseenError(
                f"an error that was not foreseen ({what}); all about it is in {path}: please "
                "report it with that file. What is finished is kept"
            )
    return UnforeseenError(f"an error that was not foreseen, and could not be written down: {what}")


def _written(folder: Path | None, name: str, text: str) -> Path | None:
    if folder is None or not folder.is_dir():
        return None
    try:
        # A new file, whatever somebody may have put in the way.
        descriptor, path = tempfile.mkstemp(".txt", f"{name}-", folder)
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return Path(path)


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} unknown")
    return ", ".join(found)
