"""Few-shot data, wherever it comes from: classes, their words, and their images."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.folders import list_folders
from tir_kernels.fewshot.data.huggingface import HUB_PREFIX, load_hugging_face
from tir_kernels.fewshot.data.json_lists import read_json_list
from tir_kernels.fewshot.data.listed_images import ImageFolder
from tir_kernels.fewshot.data.listings import LIST_ENDINGS, Listing, class_name, shown_name
from tir_kernels.fewshot.data.tables import read_table
from tir_kernels.fewshot.data.words import class_words
from tir_kernels.text import Notice, setting

_DATA = setting("data")
_IMAGES = setting("images")

# A file's size in bytes, and a number that changes when it is written: nanoseconds since 1970.
Stamp = tuple[int, int]


class ImageSource(Protocol):
    """Where the images of a data set lie.

    Attributes:
        identity: Text that differs wherever images of one name and stamp may differ.
    """

    @property
    def identity(self) -> str: ...

    def describe(self, name: str) -> str:
        """Where an image is, for messages; for the name "" where all of them are."""

    def file(self, name: str) -> Path | IO[bytes]:
        """The file or path that Pillow opens; OSError or ValueError where it can't be had."""

    def stamp(self, name: str) -> Stamp:
        """A stamp that tells an image from an earlier one of its name; raises as ``file``."""


@dataclass(frozen=True)
class FileSource:
    """Images that are files; names are paths relative to the root, or absolute ones."""

    root: Path

    @property
    def identity(self) -> str:
        """The root: files are not known by their content."""
        return str(self.root.resolve())

    def describe(self, name: str) -> str:
        """The file's path."""
        return str(self.root / name)

    def file(self, name: str) -> Path:
        """The file's path."""
        return self.root / name

    def stamp(self, name: str) -> Stamp:
        """The file's size and time of modification."""
        status = os.stat(os.path.join(self.root, name))
        return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class ImageClass:
    """A class of images.

    Args:
        folder: Its name in the data: that of its folder, or its label.
        words: The words a prompt uses.
        files: Its images' names in the data's source.
        stamps: Size and time of each, when the data was listed.
        left_out: What else its folder holds, in words.
    """

    folder: str
    words: str
    files: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    left_out: str = ""


@dataclass(frozen=True)
class ImageData:
    """Classes of images, sorted by name.

    Args:
        source: Where the images lie.
        classes: The classes.
        fingerprint: Digest of class words, and of the names, sizes and times of images.
        notes: Lines for the user on how the data was understood.
    """

    source: ImageSource
    classes: tuple[ImageClass, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Where the images are, for messages."""
        return self.source.describe("")

    def require(self, *, ways: int, shots: int, queries: int) -> None:
        """Check that episodes of this size can be drawn.

        Raises:
            FewShotError: Too few classes, or a class with too few images.
        """
        if ways > len(self.classes):
            raise FewShotError(
                f"{setting('ways', ways)} is more than the {len(self.classes)} classes in "
                f"{self.name} "
                f"({_some([entry.folder for entry in self.classes])}); lower {setting('ways')}"
            )
        needed = shots + queries
        small = [entry for entry in self.classes if len(entry.files) < needed]
        if small:
            others = f" ({len(small) - 1} more classes have too few)" if len(small) > 1 else ""
            left_out = f" (left out: {small[0].left_out})" if small[0].left_out else ""
            raise FewShotError(
                f"class {small[0].folder!r} in {self.name} has {len(small[0].files)} images"
                f"{left_out} but {needed} are needed ({shots} shots + {queries} queries){others}; "
                f"add images, remove the class, or lower {setting('shots')} or {setting('queries')}"
            )


def load_data(
    data: str | Path,
    *,
    class_names: Mapping[str, str] | str | Path | None = None,
    images: str | Path | None = None,
) -> ImageData:
    """List the classes and images of a data set; no image is decoded.

    Args:
        data: A folder with a sub-folder of images per class, see ``list_folders``; a file that
            lists images, see ``read_json_list`` and ``read_table``; ``hf:NAME`` or
            ``hf:NAME:SPLIT``, a data set of Hugging Face; or a folder into which such a data set
            was saved.
        class_names: Words of each class, see ``class_words``.
        images: Folder of the images that a file lists; ``None``: the file's own.

    Raises:
        FewShotError: The data or the class names can't be used.
    """
    for name, value in (("data", data), ("images", images), ("class_names", class_names)):
        if value == "":
            raise FewShotError(f"{setting(name)} is empty; name what it should be, or leave it out")
    is_on_hub, path = str(data).startswith(HUB_PREFIX), Path(os.path.expanduser(data))
    is_list = not is_on_hub and _is_list(path)
    if images is not None and not is_list:
        raise FewShotError(
            f"{_IMAGES} goes with a JSON or CSV file; {setting('data', data)} is none"
        )
    source: ImageSource
    if is_on_hub or _is_saved_data_set(path):
        source, files = load_hugging_face(str(data) if is_on_hub else path)
        listing = Listing(files)
    elif is_list:
        root = path.parent if images is None else Path(os.path.expanduser(images))
        source, listing = FileSource(root), _read_list(path, root, is_given=images is not None)
    else:
        source, listing = FileSource(path), list_folders(path)
    words, note = class_words(list(listing.files), class_names)
    classes = tuple(
        ImageClass(
            shown_name(name),
            words[name],
            tuple(names),
            _stamps(source, names),
            listing.left_out.get(name, ""),
        )
        for name, names in listing.files.items()
    )
    notes = (*listing.notes, note) if note else listing.notes
    # What they quote may come from file names and other programs.
    notes = tuple(Notice(line) for line in notes)
    return ImageData(source, classes, _fingerprint(classes), notes)


def _is_list(path: Path) -> bool:
    """Whether the data is a file, and not a folder; refuses what is neither."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FewShotError(
            f"{_DATA}: {path} does not exist; pass a folder with a sub-folder per class, or a JSON "
            "or CSV file"
        ) from error
    except (OSError, ValueError) as error:
        raise FewShotError(f"{_DATA}: can't read {path}: {first_line(error)}") from error
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return stat.S_ISREG(mode)
    raise FewShotError(
        f"{_DATA}: {path} is neither a folder nor a regular file, but a pipe or device; pass a "
        "folder with a sub-folder per class, or a JSON or CSV file"
    )


def _read_list(path: Path, root: Path, *, is_given: bool) -> Listing:
    """The images that a file lists, below a root that the user gave or that is the file's own."""
    if not os.path.isdir(root):
        raise FewShotError(f"{_IMAGES}: there is no folder {root}")
    # Where the user named a folder, absolute paths too are looked up in it.
    images = ImageFolder(path, root, takes_absolute=not is_given)
    ending = path.suffix.lower()
    if ending not in LIST_ENDINGS:
        raise FewShotError(
            f"{_DATA}: {path} is a file but does not end in {', '.join(LIST_ENDINGS[:-1])} or "
            f"{LIST_ENDINGS[-1]}; pass such a list, or a folder with a sub-folder per class"
        )
    return (read_json_list if ending == ".json" else read_table)(path, images)


def _is_saved_data_set(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _stamps(source: ImageSource, names: Sequence[str]) -> tuple[Stamp, ...]:
    try:
        return tuple(source.stamp(name) for name in names)
    except (OSError, ValueError) as error:
        raise FewShotError(f"{_DATA}: {first_line(error)}") from error


def _fingerprint(classes: Sequence[ImageClass]) -> str:
    digest = hashlib.sha256()
    for entry in classes:
        images = [
            (class_name(name), *stamp)
            for name, stamp in zip(entry.files, entry.stamps, strict=True)
        ]
        digest.update(json.dumps([entry.folder, entry.words, images]).encode())
    return digest.hexdigest()


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
