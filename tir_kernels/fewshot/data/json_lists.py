"""JSON lists of images, as the cross-domain few-shot benchmark writes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.documents import LIST_BYTES, parse_json, read_document
from tir_kernels.fewshot.data.listed_images import ImageFolder, ImageList, Pair
from tir_kernels.fewshot.data.names import class_name
from tir_kernels.fewshot.data.parts import choose_parts, parts_note, require_same_classes
from tir_kernels.fewshot.data.protocol import Listing
from tir_kernels.text import setting

_DATA = setting("data")


class JsonList(ImageList):
    """A JSON file that lists images and their labels."""

    endings = (".json",)

    def listing(self, path: Path, images: ImageFolder) -> Listing:
        """The images that the file lists; see ``read_json_list``."""
        return read_json_list(path, images)


def read_json_list(path: Path, images: ImageFolder) -> Listing:
    """The images of an object with ``image_names``, ``image_labels`` and ``label_names``.

    The names are paths, the labels whole numbers that count through the classes from 0. Classes
    without images are left out. Also read are the splits of CoOp (arXiv 2109.01134), of which
    support comes from the part for training, and queries from the one for tests: an object with
    ``train``, ``val`` and ``test``, each a list of [path, label, class name].

    Args:
        path: The file.
        images: Folder in which its images are looked up.

    Raises:
        FewShotError: The file is not such a list, or images are missing or ambiguous.
    """
    content = parse_json(path, read_document(path, "data", at_most=LIST_BYTES), "data")
    if isinstance(content, dict) and "image_names" not in content and "train" in content:
        return _read_split(path, content, images)
    names, labels, classes = (
        _entry(path, content, *entry)
        for entry in (("image_names", str), ("image_labels", int), ("label_names", str))
    )
    if len(names) != len(labels):
        raise FewShotError(
            f"{_DATA}: {path} has {len(names)} image_names but {len(labels)} image_labels"
        )
    classes = [class_name(name) for name in classes]
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise FewShotError(f"{_DATA}: {path} has {repeated[0]!r} twice among its label_names")
    for name, label in zip(names, labels, strict=True):
        if not 0 <= label < len(classes):
            raise FewShotError(
                f"{_DATA}: {path} gives {name} the label {label}, but its {len(classes)} "
                f"label_names are counted from 0 to {len(classes) - 1}"
            )
    pairs = [(name, classes[label]) for name, label in zip(names, labels, strict=True)]
    return images.resolve(pairs)


def _entry(path: Path, content: Any, key: str, kind: type) -> list[Any]:
    values = content.get(key) if isinstance(content, dict) else None
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        what = {str: "strings", int: "whole numbers"}[kind]
        raise FewShotError(
            f"{_DATA}: {path} must hold an object with image_names, image_labels and label_names, "
            f"but {key} is not a list of {what}"
        )
    return values


def _read_split(path: Path, content: dict[str, Any], images: ImageFolder) -> Listing:
    """The images of a split as CoOp writes them."""
    parts = {part: _split_rows(path, part, content[part]) for part in content}
    chosen = choose_parts({part: sorted({row[1] for row in parts[part]}) for part in parts})
    if chosen is None:
        train, test = parts["train"], parts.get("test") or parts.get("val") or []
        names = {label for _, label in train}, {label for _, label in test}
        require_same_classes(f"{_DATA}: {path}", "train", names[0], "test", names[1])
        raise FewShotError(f"{_DATA}: {path} must hold images of several classes in train and test")
    pairs = [pair for part in chosen for pair in parts[part]]
    marks = [part for part in chosen for _ in parts[part]]
    # As if parts were groups, so that an image that is in both is refused.
    found = images.resolve(pairs, marks)
    support, queries = (
        {
            label: [
                name for name, mark in zip(names, found.groups[label], strict=True) if mark == part
            ]
            for label, names in found.files.items()
        }
        for part in chosen
    )
    others = [part for part in parts if part not in chosen]
    return Listing(support, (parts_note(path, *chosen, others),), queries=queries)


def _split_rows(path: Path, part: str, rows: Any) -> list[Pair]:
    """The images of a part with their classes."""
    labels: dict[int, str] = {}
    if not isinstance(rows, list):
        raise FewShotError(f"{_DATA}: {path} must hold a list of images for {part!r}")
    for row in rows:
        kinds = [type(value) for value in row] if isinstance(row, list) else []
        if kinds != [str, int, str]:
            raise FewShotError(
                f"{_DATA}: {part!r} of {path} must hold [path, label, class name] for each image; "
                f"got {str(row)[:80]}"
            )
        if labels.setdefault(row[1], row[2]) != row[2]:
            raise FewShotError(
                f"{_DATA}: {part!r} of {path} gives label {row[1]} the names {labels[row[1]]!r} "
                f"and {row[2]!r}; keep one"
            )
    return [(name, class_name(label)) for name, _, label in rows]
