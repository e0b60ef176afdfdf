"""Finding the image files below a folder: each real one once, and without what tools leave."""

from __future__ import annotations

import heapq
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tir_kernels.fewshot.data.formats import is_image_name

# A file's device and number there: the same for all its names.
FileId = tuple[int, int]

# Beside hidden names, which start with a dot: what systems, network drives, and programs keep in
# folders, in lower case.
_LEFT_BY_TOOLS = {
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@tmp",
    "__macosx", "__pycache__", "_vti_cnf", "desktop.ini", "ehthumbs.db", "found.000", "icon\r",
    "lost+found", "network trash folder", "recycler", "system volume information",
    "temporary items", "thumbs.db", "~snapshot",
}  # fmt: skip
# Copies that Syncthing, Dropbox, Nextcloud and ownCloud make of a file that two machines changed.
_CONFLICT = re.compile(
    r"\.sync-conflict-\d{8}-\d{6}-\w+\.|\(.*conflicted copy.*\)|_conflict-\d{8}-\d{6}",
    re.IGNORECASE,
)


def is_left_by_tools(name: str) -> bool:
    """Whether a file or folder is hidden, a backup, or otherwise kept by a program for itself."""
    return (
        name.startswith((".", "~$"))
        or name.endswith("~")
        or name.lower() in _LEFT_BY_TOOLS
        or _CONFLICT.search(name) is not None
    )


def file_id(status: os.stat_result) -> FileId:
    """The identity that all names of a file have in common, links included."""
    return status.st_dev, status.st_ino


class LeftOut(Counter[tuple[str, str]]):
    """The number left out of each kind; a kind is a noun and what follows it."""

    def file(self, name: str) -> None:
        """Count a file that is none of those read."""
        ending = os.path.splitext(name)[1].lower()
        self["file", f"ending in {ending}" if ending else "without an ending"] += 1

    def __str__(self) -> str:
        kinds = [
            f"{count} {noun}{'' if count == 1 else 's'} {rest}".strip()
            for (noun, rest), count in sorted(self.items(), key=lambda item: (-item[1], item[0]))
        ]
        more = f" and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
        return ", ".join(kinds[:6]) + more


class FoundImages(NamedTuple):
    """The images below a folder.

    Args:
        names: Each real file's name; the one that needs no link where there are several.
        left_out: Everything else there was.
    """

    names: dict[FileId, str]
    left_out: LeftOut


def find_images(root: Path, folder: str = "") -> FoundImages:
    """The images in a folder and in those below it, links followed.

    Args:
        root: Folder that names are relative to.
        folder: Folder to look in, relative to the root.

    Raises:
        OSError: A folder can't be read.
    """
    left_out = LeftOut()
    # Names that need no link come first in order, so that the names of files depend on neither the
    # file system nor on when links were made.
    names: dict[FileId, tuple[bool, str]] = {}
    seen: set[FileId] = set()
    waiting = [(False, folder)]
    while waiting:
        is_linked, here = heapq.heappop(waiting)
        own = file_id(os.stat(root / here))
        if own in seen:
            left_out["link", "to folders that are listed already"] += 1
            continue
        seen.add(own)
        with os.scandir(root / here) as entries:
            for entry in entries:
                status = _status(entry, left_out)
                if status is None:
                    continue
                path = f"{here}/{entry.name}" if here else entry.name
                name = is_linked or entry.is_symlink(), path
                if stat.S_ISDIR(status.st_mode):
                    heapq.heappush(waiting, name)
                    continue
                other = names.setdefault(file_id(status), name)
                if other != name:
                    left_out["further name", "of images that are listed already"] += 1
                    names[file_id(status)] = min(name, other)
    return FoundImages({file: name for file, (_, name) in names.items()}, left_out)


def _status(entry: os.DirEntry[str], left_out: LeftOut) -> os.stat_result | None:
    """The status of a folder or an image, or ``None`` for what is left out, which is counted."""
    try:
        status = entry.stat()
    except OSError:
        if entry.is_symlink():
            left_out["link", "that can't be followed"] += 1
        elif not is_left_by_tools(entry.name):
            raise
        return None
    is_folder = stat.S_ISDIR(status.st_mode)
    if is_left_by_tools(entry.name):
        if is_folder:
            left_out["folder", f"called {entry.name}"] += 1
        elif is_image_name(entry.name):
            left_out["image", "hidden or left by another program"] += 1
        return None
    if is_folder:
        return status
    if not is_image_name(entry.name):
        left_out.file(entry.name)
        return None
    if not stat.S_ISREG(status.st_mode):
        left_out["pipe or device", f"called {entry.name}"] += 1
        return None
    return status
