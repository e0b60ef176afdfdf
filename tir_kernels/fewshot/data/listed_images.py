"""Files that list images, whose names may be those of another machine or without ending."""

from __future__ import annotations

import os
import unicodedata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence, Set
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.image_files import ImageFiles
from tir_kernels.fewshot.data.names import class_name, sort_key
from tir_kernels.fewshot.data.protocol import Listing
from tir_kernels.fewshot.data.walk import FileId, file_id, find_images
from tir_kernels.text import setting

_DATA = setting("data")
_IMAGES = setting("images")

# A listed image, and its class.
Pair = tuple[str, str]


class ImageList(ABC):
    """A file that lists images which lie beside it, or in a folder that the user names."""

    takes_images = True
    endings: tuple[str, ...] = ()

    def owns(self, data: str) -> bool:
        """Whether it is a file with one of the endings."""
        return os.path.isfile(data) and Path(data).suffix.lower() in self.endings

    def read(self, data: str, images: Path | None) -> tuple[ImageFiles, Listing]:
        """Read the list and look its images up."""
        source, folder = self.lookup(data, images)
        return source, self.listing(Path(data), folder)

    def lookup(self, data: str, images: Path | None) -> tuple[ImageFiles, ImageFolder]:
        """The folder of a list's images; the arguments are those of ``read``."""
        path = Path(data)
        root = path.parent if images is None else images
        if not os.path.isdir(root):
            raise FewShotError(f"{_IMAGES}: there is no folder {root}")
        # Where the user named a folder, absolute paths too are looked up in it.
        return ImageFiles(root), ImageFolder(path, root, takes_absolute=images is None)

    @abstractmethod
    def listing(self, path: Path, images: ImageFolder) -> Listing:
        """The images that the file lists.

        Args:
            path: The file.
            images: Folder in which its images are looked up.
        """


class ImageFolder:
    """A folder in which listed images are looked up.

    A path that leads to a file is taken as it is. Of another, which comes from another machine or
    is a bare name, the file is taken that has its name and shares most of the folders above it.

    Args:
        listing: The list, for messages.
        root: The folder.
        takes_absolute: Whether absolute paths may lead out of it.
    """

    def __init__(self, listing: Path, root: Path, *, takes_absolute: bool) -> None:
        self._listing = listing
        self._root = root
        self._takes_absolute = takes_absolute

    def resolve(self, pairs: Sequence[Pair], groups: Sequence[str] = ()) -> Listing:
        """The images of each class as names relative to the root, where they are found.

        Args:
            pairs: The listed images with their classes.
            groups: The subject that each shows; empty where none are known.

        Raises:
            FewShotError: An image is missing, ambiguous, or listed twice; or there are none.
        """
        found: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        owners: dict[FileId, Pair] = {}
        folders = {_as_path(listed).parent.name for listed, _ in pairs}
        for (listed, label), group in zip(pairs, groups or [""] * len(pairs), strict=True):
            name = self._find(listed, folders)
            file = self._id(listed, name)
            if file in owners:  # links and detours give one file several names
                other, other_label = owners[file]
                classes = f" in classes {other_label!r} and {label!r}" * (label != other_label)
                raise FewShotError(
                    f"{_DATA}: {self._listing} lists {other} and {listed}, which are the same "
                    "file, "
                    f"{self._root / name}{classes}; keep one of them, or pass the images' own "
                    f"folder with {_IMAGES}"
                )
            owners[file] = listed, label
            found[label].append((name, group))
        if not found:
            raise FewShotError(f"{_DATA}: {self._listing} lists no images")
        rows = {
            label: sorted(found[label], key=lambda row: sort_key(row[0])) for label in sorted(found)
        }
        files = {label: [name for name, _ in own] for label, own in rows.items()}
        if not groups:
            return Listing(files)
        return Listing(
            files, groups={label: [group for _, group in own] for label, own in rows.items()}
        )

    def has(self, listed: str) -> bool:
        """Whether there is such an image, or several that may be meant."""
        path = _as_path(listed)
        return self._is_file(path) or bool(self._candidates(path))

    def _find(self, listed: str, folders: Set[str]) -> str:
        """The name of a listed image, where ``folders`` are those that listed images lie in."""
        path = _as_path(listed)
        # File systems give a name in the form of Unicode in which it was made.
        for form in (listed, class_name(listed), unicodedata.normalize("NFD", listed)):
            if self._is_file(_as_path(form)):
                return _as_path(form).as_posix()
        shared = {each: _shared_end(path.parent, each.parent) for each in self._candidates(path)}
        # Many data sets have a 1.jpg in every folder: what other listed images lie beside is
        # another image, however few are called so.
        shared = {
            each: count
            for each, count in shared.items()
            if count > 0 or each.parent.name not in folders - {path.parent.name}
        }
        best = [each for each, count in shared.items() if count == max(shared.values())]
        if not best:
            raise FewShotError(
                f"{_DATA}: {self._listing} lists {listed}, but no such file is in {self._root} or "
                f"the folders in it; pass the images' folder with {_IMAGES}"
            )
        if len(best) > 1:
            raise FewShotError(
                f"{_DATA}: {self._listing} lists {listed}, which may be {best[0]} or {best[1]} in "
                f"{self._root}; pass the folder that has only one of them with {_IMAGES}"
            )
        return best[0].as_posix()

    def _is_file(self, path: PurePosixPath) -> bool:
        """Whether a path leads to a regular file; pipes and devices are no images."""
        may_be = self._takes_absolute or not path.is_absolute()
        return may_be and os.path.isfile(self._root / path)

    def _id(self, listed: str, name: str) -> FileId:
        try:
            return file_id(os.stat(self._root / name))
        except OSError as error:
            raise FewShotError(
                f"{_DATA}: {self._listing} lists {listed}: {first_line(error)}"
            ) from error

    def _candidates(self, path: PurePosixPath) -> Sequence[PurePosixPath]:
        name = class_name(path.name)
        return self._by_name.get(name) or self._by_name.get(f"{name}.*", [])

    @cached_property
    def _by_name(self) -> dict[str, list[PurePosixPath]]:
        """File name, and stem with ".*" for lists without endings -> paths under the root."""
        paths: defaultdict[str, list[PurePosixPath]] = defaultdict(list)
        try:
            found = find_images(self._root)
        except OSError as error:
            raise FewShotError(
                f"{_IMAGES}: can't list {self._root}: {first_line(error)}"
            ) from error
        for name in sorted(found.names.values()):
            path = PurePosixPath(name)
            paths[class_name(path.name)].append(path)
            paths[f"{class_name(path.stem)}.*"].append(path)
        return paths


def _as_path(listed: str) -> PurePosixPath:
    return PurePosixPath(listed.replace("\\", "/"))


def _shared_end(one: PurePosixPath, other: PurePosixPath) -> int:
    """The number of last parts that two paths share."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    same = takewhile(lambda pair: class_name(pair[0]) == class_name(pair[1]), pairs)
    return sum(1 for _ in same)
