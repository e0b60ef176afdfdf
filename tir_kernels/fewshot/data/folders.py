"""The images of a folder that has a folder of images for each class."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.formats import image_endings, is_image_name
from tir_kernels.fewshot.data.image_files import ImageFiles
from tir_kernels.fewshot.data.names import class_name, shown_name, sort_key
from tir_kernels.fewshot.data.parts import choose_parts, parts_note
from tir_kernels.fewshot.data.protocol import Files, Listing
from tir_kernels.fewshot.data.sources import list_endings
from tir_kernels.fewshot.data.walk import (
    FileId,
    FoundImages,
    LeftOut,
    find_images,
    is_left_by_tools,
)
from tir_kernels.text import setting

_DATA = setting("data")

# Parts into which data sets are divided, each with the classes in it.
_PARTS = re.compile(
    r"(train(ing)?|trn|test(ing)?|tst|val(id(ation)?)?|dev|eval(uation)?|holdout|pred(ict(ion)?)?|"
    r"support|query|gallery|images?|imgs?|masks?|labels?|annotations?)(set|data)?"
)
# What their names may hold beside that.
_BESIDE_PARTS = re.compile(r"set|data(set)?|seg|split|folder|all|new|original|\d+|")
_FIRST_PARTS = ("train", "training", "images")


class ClassFolders:
    """A folder that has a folder of images for each class."""

    takes_images = False
    endings = ()

    def owns(self, data: str) -> bool:
        """Whether it is a folder."""
        return os.path.isdir(data)

    def read(self, data: str, images: Path | None) -> tuple[ImageFiles, Listing]:
        """List the images of each folder; see ``list_folders``."""
        root = Path(data)
        return ImageFiles(root), list_folders(root)


def list_folders(root: Path) -> Listing:
    """The images in each sub-folder of a folder.

    Left out are hidden files and folders, what other programs leave in folders, and files that are
    no images by their ending. Links are followed; a file counts once, however many names it has.

    Where the sub-folders are parts of a data set with the same classes, support comes from the
    part for training, and queries from the one for tests, or else for validation.

    Raises:
        FewShotError: The folder can't be read, has no images in sub-folders, or its sub-folders
            are other parts of a data set that have the classes in them; two classes or parts reach
            one file, or have one name.
    """
    try:
        folders, left_out = _class_folders(root)
        found = {name: find_images(root, name) for name in folders}
    except OSError as error:
        raise FewShotError(f"{_DATA}: can't list {root}: {first_line(error)}") from error
    if not folders:
        raise FewShotError(_without_folders(root, left_out))
    _refuse_twins(root, folders)
    _refuse_shared_files(root, found)
    for each in found.values():
        left_out.update(each.left_out)
    if not any(each.names for each in found.values()):
        others = f" (left out: {left_out})" if left_out else ""
        raise FewShotError(
            f"{_DATA}: no images in the sub-folders of {root}{others}; "
            f"files with these endings are read: {' '.join(sorted(image_endings()))}"
        )
    if parts := _parts_inside(found):
        return _list_parts(root, *parts, folders)
    files = {class_name(name): sorted(found[name].names.values(), key=sort_key) for name in folders}
    notes = _about_parts(root, files)
    if left_out:
        notes += (f"left out of {root}: {left_out}",)
    texts = {class_name(name): str(each.left_out) for name, each in found.items()}
    return Listing(files, notes, texts)


def _class_folders(root: Path) -> tuple[list[str], LeftOut]:
    """The names of the folders of classes, and what images and folders lie beside them."""
    folders, left_out = [], LeftOut()
    with os.scandir(root) as entries:
        for entry in entries:
            is_folder = os.path.isdir(entry.path)
            if is_folder and is_left_by_tools(entry.name):
                left_out["folder", f"called {entry.name}"] += 1
            elif is_folder:
                folders.append(entry.name)
            elif is_image_name(entry.name) and not is_left_by_tools(entry.name):
                left_out["image", "beside the folders of the classes"] += 1
    return sorted(folders, key=sort_key), left_out


def _without_folders(root: Path, left_out: LeftOut) -> str:
    images = left_out["image", "beside the folders of the classes"]
    what = f"{images} images but no sub-folders" if images else "no sub-folders"
    lists = sorted(each.name for each in root.iterdir() if each.suffix.lower() in list_endings())
    way = f", or the list of them: {setting('data', root / lists[0])}" if images and lists else ""
    return f"{_DATA}: {root} has {what}; it needs one folder of images per class{way}"


def _refuse_twins(root: Path, folders: Sequence[str]) -> None:
    owners: dict[str, str] = {}
    for name in folders:
        # As they are shown: a journal has to tell them apart, too.
        other = owners.setdefault(shown_name(class_name(name)), name)
        if other != name:
            raise FewShotError(
                f"{_DATA}: {root} has two folders called {shown_name(name)!r}, written in "
                "different "
                "forms of Unicode; rename or merge them"
            )


def _refuse_shared_files(root: Path, found: Mapping[str, FoundImages]) -> None:
    owners: dict[FileId, tuple[str, str]] = {}
    for folder, images in found.items():
        for file, name in images.names.items():
            other, other_name = owners.setdefault(file, (folder, name))
            if other != folder:
                kind = "parts" if _is_part(other) and _is_part(folder) else "classes"
                raise FewShotError(
                    f"{_DATA}: {kind} {other!r} and {folder!r} of {root} share a file: "
                    f"{other_name} and {name} are links to it or the same; keep one of them"
                )


def _parts_inside(found: Mapping[str, FoundImages]) -> tuple[str, str] | None:
    """The folders that hold the support and the queries of the same classes, if there are two."""
    inside = {
        name: _folders_inside(list(images.names.values()))
        for name, images in found.items()
        if _is_part(name)
    }
    return choose_parts({name: own for name, own in inside.items() if len(own) > 1})


def _list_parts(root: Path, train: str, queries: str, folders: Sequence[str]) -> Listing:
    """The listing of two parts: of the one for support, with the images of the other as queries."""
    support, asked = list_folders(root / train), list_folders(root / queries)
    others = [name for name in folders if name not in (train, queries)]
    both = [name for name in support.files if name in asked.files]
    return Listing(
        {name: [f"{train}/{file}" for file in support.files[name]] for name in both},
        (parts_note(root, train, queries, others), *support.notes, *asked.notes),
        support.left_out,
        queries={name: [f"{queries}/{file}" for file in asked.files[name]] for name in both},
    )


def _about_parts(root: Path, files: Files) -> tuple[str, ...]:
    """A note where classes may be the parts of a data set; refuses them where they are."""
    classes = {name: names for name, names in files.items() if names}
    inside = {name: _folders_inside(names) for name, names in classes.items()}
    divided = [name for name in classes if inside[name]]
    parts = [name for name in classes if _is_part(name)]
    divided_parts = [name for name in divided if name in parts]
    first = next((name for name in divided_parts if name.lower() in _FIRST_PARTS), None)
    if len(classes) == 1 and len(divided) == 1:
        raise FewShotError(
            f"{_DATA}: {root} has images in the one folder {divided[0]!r}, in its folders "
            f"{_some(inside[divided[0]])}; if these are the classes, pass "
            f"{setting('data', root / divided[0])}"
        )
    if len(divided_parts) > 1 or (divided_parts and len(parts) == len(classes)):
        first = first or divided_parts[0]
        raise FewShotError(
            f"{_DATA}: {root} has the parts of a data set, {_some(parts)}, with the classes as "
            f"folders in them ({_some(inside[first])}); pass one part: "
            f"{setting('data', root / first)}"
        )
    if len(parts) == len(classes):
        return (f"the classes of {root} are called {_some(parts)}, as parts of data sets are",)
    if len(divided) == len(classes) and len(set(map(tuple, inside.values()))) == 1:
        return (
            f"all classes of {root} ({_some(list(classes))}) have the same folders in them "
            f"({_some(inside[divided[0]])}), whose images all count; if those are the classes, "
            f"pass {setting('data', root / divided[0])}",
        )
    return ()


def _folders_inside(names: Sequence[str]) -> list[str]:
    """The folders that all images of a class lie in; none where some lie beside them."""
    paths = [name.split("/", 2) for name in names]
    if any(len(parts) == 2 for parts in paths):
        return []
    return sorted({parts[1] for parts in paths})


def _is_part(name: str) -> bool:
    """Whether a folder's name is that of a part, such as "train", "seg_test" or "val2017"."""
    words = re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    known = [_PARTS.fullmatch(word) is not None for word in words]
    return any(known) and all(
        is_known or _BESIDE_PARTS.fullmatch(word)
        for is_known, word in zip(known, words, strict=True)
    )


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
