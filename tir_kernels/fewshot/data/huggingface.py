"""Data sets of Hugging Face: from the hub, or saved into a folder."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.groups import choose_group_column, read_groups, subjects_note
from tir_kernels.fewshot.data.names import class_name
from tir_kernels.fewshot.data.protocol import Files, Listing
from tir_kernels.fewshot.data.walk import FileId, file_id
from tir_kernels.text import setting

_DATA = setting("data")

if TYPE_CHECKING:
    from datasets import Dataset

HUB_PREFIX = "hf:"
# What save_to_disk writes into a folder.
_SAVED = ("dataset_dict.json", "dataset_info.json")

_BATCH = 1000


class HuggingFaceData:
    """A data set of the hub, ``hf:NAME`` or ``hf:NAME:SPLIT``, or a folder of ``save_to_disk``."""

    takes_images = False
    endings = ()

    def owns(self, data: str) -> bool:
        """Whether it has the prefix of the hub, or is a folder that holds a saved data set."""
        saved = (os.path.join(data, name) for name in _SAVED)
        return data.startswith(HUB_PREFIX) or any(map(os.path.isfile, saved))

    def read(self, data: str, images: Path | None) -> tuple[RowImages, Listing]:
        """List the images; see ``load_hugging_face``."""
        return self.read_grouped(data, images, None)

    def read_grouped(
        self, data: str, images: Path | None, group_column: str | None
    ) -> tuple[RowImages, Listing]:
        """List the images, with their groups."""
        is_on_hub = data.startswith(HUB_PREFIX)
        return load_hugging_face(data if is_on_hub else Path(data), group_column)


class RowImages:
    """Images of a data set; their names are the numbers of their rows.

    Args:
        name: The data set in words.
        images: Its column of images alone, not decoded.
        identity: Text that differs wherever the images do.
        version: Number that differs with the content of the data set, wherever it lies.
    """

    def __init__(self, name: str, images: Dataset, identity: str, version: int) -> None:
        self._name = name
        self._images = images
        (self._column,) = images.column_names
        self._stamps = _stamps(images, self._column, version)
        self.identity = identity

    def describe(self, name: str) -> str:
        """The row, or the data set."""
        return f"row {name} of {self._name}" if name else self._name

    def file(self, name: str) -> Path | io.BytesIO:
        """The image's bytes, or its file where the data set holds its path only."""
        image = self._images[int(name)][self._column]
        if image["bytes"] is None:
            return Path(image["path"])
        return io.BytesIO(image["bytes"])

    def stamp(self, name: str) -> tuple[int, int]:
        """The image's size, and the data set's version or, of a file, its time."""
        return self._stamps[int(name)]


def load_hugging_face(
    data: str | Path, group_column: str | None = None
) -> tuple[RowImages, Listing]:
    """The images of each class of a data set with an image and a label in each row.

    Args:
        data: ``hf:NAME`` or ``hf:NAME:SPLIT`` of the hub, which is downloaded unless it is in the
            cache, or the folder that ``save_to_disk`` wrote.
        group_column: Column of the subjects that images show, see ``choose_group_column``.

    Raises:
        FewShotError: The package ``datasets`` is missing, the data set can't be loaded, it has not
            one image and one label a row, or there is no such column of groups.
    """
    try:
        import datasets
    except ImportError as error:
        raise FewShotError(
            f"{setting('data', data)} needs the package datasets ({first_line(error)}); install "
            "it with: "
            'pip install "tir_kernels[huggingface]"'
        ) from error
    loaded = _load(datasets, data)
    image = _column(data, loaded, datasets.Image, "image")
    label = _column(data, loaded, datasets.ClassLabel, "label")
    names = loaded.features[label].names
    classes: list[str] = []
    for row, number in enumerate(loaded.with_format("numpy")[label][:]):
        if not 0 <= number < len(names):  # nor is that so of the NaN that stands for none
            raise FewShotError(f"{_DATA}: row {row} of {data} has no label; choose another split")
        classes.append(class_name(names[int(number)]))
    if not classes:
        raise FewShotError(f"{_DATA}: {data} has no rows")
    listing = _listing(loaded, str(data), classes, _Columns(image, label, group_column))
    images = loaded.select_columns(image).cast_column(image, datasets.Image(decode=False))
    # A data set on the hub may change under its name; the fingerprint is of its content. The one
    # that was loaded is saved with it, that of ``images`` made anew by each release of datasets.
    version = int(hashlib.sha256(loaded._fingerprint.encode()).hexdigest()[:15], 16)
    try:
        source = RowImages(str(data), images, f"{data} {images._fingerprint}", version)
    except (OSError, ValueError) as error:
        raise FewShotError(f"{_DATA}: {data} can't be read: {first_line(error)}") from error
    return source, listing


class _Columns(NamedTuple):
    """The columns of a data set: of images, of labels, and what the user said of groups."""

    image: str
    label: str
    groups: str | None


def _listing(loaded: Dataset, data: str, classes: Sequence[str], columns: _Columns) -> Listing:
    """The rows of each class with their groups; ``classes`` has the class of each row."""
    files: Files = {name: [] for name in sorted(set(classes))}
    for row, name in enumerate(classes):
        files[name].append(str(row))
    header = list(loaded.column_names)
    at = choose_group_column(data, header, classes, columns.groups)
    if at is None:
        if columns.groups is not None:
            return Listing(files)
        taken = [
            number
            for number, name in enumerate(header)
            if name in (columns.image, columns.label) or not _holds_values(loaded, name)
        ]
        notes = subjects_note(data, header, taken, lambda at: _values(loaded, header[at]))
        return Listing(files, notes)
    if not _holds_values(loaded, header[at]):
        raise FewShotError(
            f"{setting('group_column')}: column {header[at]} of {data} has a "
            f"{type(loaded.features[header[at]]).__name__} in each row; name one of texts or "
            "numbers"
        )
    rows = [str(row) for row in range(len(classes))]
    groups, note = read_groups(data, header[at], rows, _values(loaded, header[at]))
    by_class = {name: [groups[int(row)] for row in own] for name, own in files.items()}
    return Listing(files, (note,), groups=by_class, group_column=header[at])


def _holds_values(loaded: Dataset, column: str) -> bool:
    """Whether a column has one text or number in each row, rather than an image or a list."""
    kind = getattr(loaded.features[column], "dtype", "")
    return re.fullmatch(r"(large_)?string|u?int\d+|float\d+", kind) is not None


def _values(loaded: Dataset, column: str) -> list[str]:
    """A column as texts; without a value, the empty one."""
    table = loaded.select_columns(column).with_format("arrow")[:]
    return ["" if value is None else str(value) for value in table[column].to_pylist()]


def _load(datasets: Any, data: str | Path) -> Dataset:
    name, _, split = str(data).removeprefix(HUB_PREFIX).partition(":")
    try:
        if isinstance(data, Path):
            loaded = datasets.load_from_disk(str(data))
        else:
            loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:
        raise FewShotError(
            f"{_DATA}: can't load {data}: {type(error).__name__}: {first_line(error)}; check the "
            "name, the split and the network, or pass a folder that save_to_disk wrote"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            way = f"{data}/SPLIT" if isinstance(data, Path) else f"{data}:SPLIT"
            raise FewShotError(
                f"{_DATA}: {data} has several splits ({', '.join(loaded)}); choose one: {way}"
            )
        (loaded,) = loaded.values()
    return loaded


def _column(data: str | Path, loaded: Dataset, kind: type, usual: str) -> str:
    found = [name for name, feature in loaded.features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if usual in found:
        return usual
    columns = ", ".join(f"{name} ({type(f).__name__})" for name, f in loaded.features.items())
    raise FewShotError(
        f"{_DATA}: {data} has {len(found) or 'no'} columns of type {kind.__name__}, and none "
        "called "
        f"{usual!r}: it has {columns}; rename or cast one and save the data set with save_to_disk"
    )


def _stamps(images: Dataset, column: str, version: int) -> list[tuple[int, int]]:
    import pyarrow.compute as pc

    stamps: list[tuple[int, int]] = []
    owners: dict[FileId, int] = {}  # of files, the first row
    for table in images.with_format("arrow").iter(batch_size=_BATCH):
        cells = table[column].combine_chunks()
        lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
        paths = pc.struct_field(cells, "path").to_pylist()
        for length, path in zip(lengths, paths, strict=True):
            row = len(stamps)
            if length is not None:
                stamps.append((length, version))
                continue
            if path is None:
                raise ValueError(f"row {row} has no image")
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} of row {row} is not a regular file")
            other = owners.setdefault(file_id(status), row)
            if other != row:
                raise ValueError(f"rows {other} and {row} are the same file, {path}")
            stamps.append((status.st_size, status.st_mtime_ns))
    return stamps
