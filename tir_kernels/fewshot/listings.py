"""Which images each class has: from folders, from JSON lists, and from CSV tables."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file, make_dataset

from tir_kernels.fewshot.errors import FewShotError, first_line

# Class -> names of its images, both sorted.
Files = dict[str, list[str]]

_FILE_COLUMNS = ("image", "file", "filename", "file_name", "image_id", "image index", "path")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "dx", "finding labels")
_ISIC_COLUMNS = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_CHESTX_COLUMNS = {"image index", "finding labels"}
_CHESTX_CLASSES = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumothorax",
)


def list_folders(root: Path) -> Files:
    """The images in each sub-folder of a folder; hidden files and folders are left out.

    Raises:
        FewShotError: The folder can't be read, or has no images in sub-folders.
    """
    if not root.is_dir():
        raise FewShotError(
            f"--data: {root} does not exist; pass a folder with a sub-folder per class, or a JSON "
            "or CSV file"
        )

    def is_visible_image(path: str) -> bool:
        return is_image_file(path) and not Path(path).name.startswith(".")

    try:
        folders = sorted(
            entry.name
            for entry in root.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        index = {name: number for number, name in enumerate(folders)}
        found = (
            make_dataset(root, index, is_valid_file=is_visible_image, allow_empty=True)
            if index
            else []
        )
    except OSError as error:
        raise FewShotError(f"--data: can't list {root}: {first_line(error)}") from error
    if not folders:
        raise FewShotError(
            f"--data: {root} has no sub-folders; it needs one folder of images per class"
        )
    files: Files = {name: [] for name in folders}
    for path, number in found:
        files[folders[number]].append(Path(path).relative_to(root).as_posix())
    if not found:
        raise FewShotError(
            f"--data: no images in the sub-folders of {root}; "
            f"files with these endings are read: {' '.join(IMG_EXTENSIONS)}"
        )
    return {name: sorted(paths) for name, paths in files.items()}


def read_list(path: Path, root: Path, *, is_given: bool) -> tuple[Files, tuple[str, ...]]:
    """The images that a file lists.

    Args:
        path: A JSON or CSV file, see ``read_json_list`` and ``read_csv_list``.
        root: Folder of the images.
        is_given: Whether the user named that folder, so that absolute paths too are looked up in
            it.

    Returns:
        The images, and lines for the user on what was left out.

    Raises:
        FewShotError: The file is not such a list, or images are missing or ambiguous.
    """
    if not root.is_dir():
        raise FewShotError(f"--images: there is no folder {root}")
    if path.suffix.lower() == ".json":
        return read_json_list(path, root, is_given=is_given), ()
    if path.suffix.lower() == ".csv":
        return read_csv_list(path, root, is_given=is_given)
    raise FewShotError(
        f"--data: {path} is a file but does not end in .json or .csv; pass such a list, or a "
        "folder with a sub-folder per class"
    )


def read_json_list(path: Path, root: Path, *, is_given: bool) -> Files:
    """The images of a JSON list as the cross-domain few-shot benchmark writes it.

    It is an object with ``image_names`` (paths), ``image_labels`` (whole numbers) and
    ``label_names`` (the classes that the numbers count through). Classes without images are left
    out.

    Args, Raises: As ``read_list``.
    """
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise FewShotError(f"--data: {path} is not valid JSON: {error}") from error
    names, labels, classes = (
        _json_entry(path, content, *entry)
        for entry in (("image_names", str), ("image_labels", int), ("label_names", str))
    )
    if len(names) != len(labels):
        raise FewShotError(
            f"--data: {path} has {len(names)} image_names but {len(labels)} image_labels"
        )
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise FewShotError(f"--data: {path} has {repeated[0]!r} twice among its label_names")
    for name, label in zip(names, labels, strict=True):
        if not 0 <= label < len(classes):
            raise FewShotError(
                f"--data: {path} gives {name} the label {label}, but its {len(classes)} "
                f"label_names are counted from 0 to {len(classes) - 1}"
            )
    pairs = [(name, classes[label]) for name, label in zip(names, labels, strict=True)]
    return _resolve(pairs, path, root, is_given)


def _json_entry(path: Path, content: Any, key: str, kind: type) -> list[Any]:
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        what = {str: "strings", int: "whole numbers"}[kind]
        raise FewShotError(
            f"--data: {path} must hold an object with image_names, image_labels and label_names, "
            f"but {key} is not a list of {what}"
        )
    return values


def read_csv_list(path: Path, root: Path, *, is_given: bool) -> tuple[Files, tuple[str, ...]]:
    """The images of a CSV table with a header line.

    Three kinds are understood, by their columns: a file and a label; the ground truth of ISIC 2018,
    with a column of 0 and 1 per diagnosis; and the table of ChestX-ray8, of which the rows with a
    single label are kept that is one of the seven of the few-shot benchmark. Files may be without
    their ending, and lie anywhere under the root.

    Args, Returns, Raises: As ``read_list``.
    """
    header, rows = _csv_rows(path)
    columns = {name.lower(): position for position, name in enumerate(header)}
    file_column = _column(path, columns, _FILE_COLUMNS, "file")
    if set(_ISIC_COLUMNS) <= set(header):
        chosen = {name: header.index(name) for name in _ISIC_COLUMNS}
        pairs = [(row[file_column], _one_hot(path, line, row, chosen)) for line, row in rows]
        return _resolve(pairs, path, root, is_given), ()
    label_column = _column(path, columns, _LABEL_COLUMNS, "label")
    pairs = []
    for line, row in rows:
        if not row[file_column] or not row[label_column]:
            raise FewShotError(f"--data: line {line} of {path} lacks a file or a label")
        pairs.append((row[file_column], row[label_column]))
    notes: tuple[str, ...] = ()
    if columns.keys() >= _CHESTX_COLUMNS:
        kept = [pair for pair in pairs if pair[1] in _CHESTX_CLASSES]
        notes = (
            f"{path}: {len(kept)} of {len(pairs)} images kept, those with a single label that is "
            f"one of {', '.join(_CHESTX_CLASSES)}",
        )
        pairs = kept
    return _resolve(pairs, path, root, is_given), notes


def _csv_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row with the number of its line; empty lines are left out."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""))
    header: list[str] = []
    rows = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            # Some tables, that of ChestX-ray8 among them, end lines with a comma.
            while len(cells) > len(header) and not cells[-1]:
                cells.pop()
            if not header:
                header = cells
                continue
            if len(cells) != len(header):
                raise FewShotError(
                    f"--data: line {reader.line_num} of {path} has {len(cells)} columns, its "
                    f"header {len(header)}"
                )
            rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise FewShotError(f"--data: line {reader.line_num} of {path}: {error}") from error
    return header, rows


def _column(path: Path, columns: Mapping[str, int], known: Sequence[str], what: str) -> int:
    for name in known:
        if name in columns:
            return columns[name]
    raise FewShotError(
        f"--data: {path} has no column of {what}s: its first line must name one of "
        f"{', '.join(known)}; it names {', '.join(columns) or 'nothing'}"
    )


def _one_hot(path: Path, line: int, row: Sequence[str], columns: Mapping[str, int]) -> str:
    try:
        chosen = [name for name, position in columns.items() if float(row[position]) == 1]
        if len(chosen) == 1:
            return chosen[0]
    except ValueError:
        pass
    raise FewShotError(
        f"--data: line {line} of {path} must have 1 in one of the columns {', '.join(columns)}, "
        "and 0 in the others"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FewShotError(f"--data: can't read {path}: {first_line(error)}") from error


def _resolve(pairs: Sequence[tuple[str, str]], path: Path, root: Path, is_given: bool) -> Files:
    """The images of each class as names relative to the root, where they are found."""
    folder = _ImageFolder(path, root, [name for name, _ in pairs], takes_absolute=not is_given)
    files: defaultdict[str, list[str]] = defaultdict(list)
    owners: dict[str, str] = {}
    for listed, label in pairs:
        name = folder.find(listed)
        if name in owners:
            raise FewShotError(
                f"--data: {path} lists {owners[name]} and {listed}, which are the same file, "
                f"{root / name}; keep one of them, or pass the images' own folder with --images"
            )
        owners[name] = listed
        files[label].append(name)
    if not files:
        raise FewShotError(f"--data: {path} lists no images")
    return {label: sorted(files[label]) for label in sorted(files)}


class _ImageFolder:
    """Finds listed images in a folder.

    A path that leads to a file is taken as it is. Of another, which comes from another machine or
    is a bare name, the file is taken that has its name and shares most of the folders above it.
    """

    def __init__(
        self, listing: Path, root: Path, listed: Sequence[str], *, takes_absolute: bool
    ) -> None:
        self._listing = listing
        self._root = root
        self._takes_absolute = takes_absolute
        self._folders = {_as_path(name).parent.name for name in listed}

    def find(self, listed: str) -> str:
        path = _as_path(listed)
        if (self._takes_absolute or not path.is_absolute()) and (self._root / path).is_file():
            return path.as_posix()
        candidates = self._by_name.get(path.name) or self._by_name.get(f"{path.name}.*", [])
        shared = {each: _shared_end(path.parent, each.parent) for each in candidates}
        # Many data sets have a 1.jpg in every folder: what other listed images lie beside is
        # another image, however few are called so.
        shared = {
            each: count
            for each, count in shared.items()
            if count > 0 or each.parent.name not in self._folders - {path.parent.name}
        }
        best = [each for each, count in shared.items() if count == max(shared.values())]
        if not best:
            raise FewShotError(
                f"--data: {self._listing} lists {listed}, but no such file is in {self._root} or "
                "the folders in it; pass the images' folder with --images"
            )
        if len(best) > 1:
            raise FewShotError(
                f"--data: {self._listing} lists {listed}, which may be {best[0]} or {best[1]} in "
                f"{self._root}; pass the folder that has only one of them with --images"
            )
        return best[0].as_posix()

    @cached_property
    def _by_name(self) -> dict[str, list[PurePosixPath]]:
        """File name, and stem with ".*" for lists without endings -> paths under the root."""
        paths: defaultdict[str, list[PurePosixPath]] = defaultdict(list)

        def complain(error: OSError) -> None:
            raise FewShotError(f"--images: can't list {self._root}: {first_line(error)}") from error

        for folder, folders, names in os.walk(self._root, onerror=complain, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if is_image_file(name) and not name.startswith("."):
                    path = PurePosixPath(os.path.relpath(os.path.join(folder, name), self._root))
                    paths[name].append(path)
                    paths[f"{path.stem}.*"].append(path)
        return paths


def _as_path(listed: str) -> PurePosixPath:
    return PurePosixPath(listed.replace("\\", "/"))


def _shared_end(one: PurePosixPath, other: PurePosixPath) -> int:
    """How many of the last parts of two paths are the same."""
    pairs = zip(reversed(one.parts), reversed(other.parts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
