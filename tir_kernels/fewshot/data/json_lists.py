"""JSON lists of images, as the cross-domain few-shot benchmark writes them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.documents import LIST_BYTES, parse_json, read_document
from tir_kernels.fewshot.data.listed_images import ImageFolder, ImageList
from tir_kernels.fewshot.data.names import class_name
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
    without images are left out.

    Args:
        path: The file.
        images: Folder in which its images are looked up.

    Raises:
        FewShotError: The file is not such a list, or images are missing or ambiguous.
    """
    content = parse_json(path, read_document(path, "data", at_most=LIST_BYTES), "data")
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
