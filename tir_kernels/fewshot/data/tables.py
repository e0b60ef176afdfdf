"""Tables of images: a file and a class in each row, in columns that go by many names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.documents import (
    LIST_BYTES,
    Row,
    find_delimiter,
    parse_rows,
    read_document,
)
from tir_kernels.fewshot.data.groups import (
    MISSING,
    choose_group_column,
    plain_column,
    read_groups,
    subjects_note,
)
from tir_kernels.fewshot.data.image_files import ImageFiles
from tir_kernels.fewshot.data.known import known_sets
from tir_kernels.fewshot.data.known.protocol import KnownTable
from tir_kernels.fewshot.data.listed_images import ImageFolder, ImageList, Pair
from tir_kernels.fewshot.data.names import class_name
from tir_kernels.fewshot.data.protocol import Listing
from tir_kernels.text import setting

_DATA = setting("data")

# The usual names of columns, in lower case without spaces and underscores, the likelier first.
_FILE_COLUMNS = (
    "image", "file", "filename", "imageid", "imageindex", "path", "images", "img", "filepath",
    "imagepath", "imgpath", "imagename", "imgname", "imagefile", "imagefilename", "imgid", "isicid",
    "idcode", "id",
)  # fmt: skip
_LABEL_COLUMNS = (
    "label", "class", "classname", "category", "dx", "findinglabels", "labels", "classes",
    "labelname", "categoryname", "categories", "target", "diagnosis", "species", "classid",
    "labelid", "categoryid",
)  # fmt: skip
# Between several labels of one image.
_JOINT = "|"
# Rows whose files are looked up to tell a column of files from others.
_SAMPLE = 100
# A column of which this part is 0 and 1 is meant to be one, whatever else it holds.
_MOSTLY = 0.9


@dataclass(frozen=True)
class _Table:
    """A table.

    Args:
        path: Its file.
        header: The names of its columns.
        rows: The others, each as long as the header.
    """

    path: Path
    header: list[str]
    rows: list[Row]

    def column(self, position: int) -> list[str]:
        return [cells[position] for _, cells in self.rows]

    def positions(self, known: Sequence[str]) -> list[int]:
        """The columns with one of these names, in the names' order."""
        names = [plain_column(name) for name in self.header]
        found = [[at for at, name in enumerate(names) if name == each] for each in known]
        for several in found:
            if len(several) > 1:
                columns = " and ".join(repr(self.header[at]) for at in several[:2])
                raise FewShotError(
                    f"{_DATA}: {self.path} has the columns {columns}; rename the one that is not "
                    "meant"
                )
        return [at for several in found for at in several]


class TableList(ImageList):
    """A CSV or TSV file with a row for each image."""

    endings = (".csv", ".tsv")

    def listing(self, path: Path, images: ImageFolder) -> Listing:
        """The images that the file lists; see ``read_table``."""
        return read_table(path, images)

    def read_grouped(
        self, data: str, images: Path | None, group_column: str | None
    ) -> tuple[ImageFiles, Listing]:
        """Read the table, with the groups of its images."""
        source, folder = self.lookup(data, images)
        return source, read_table(Path(data), folder, group_column)


def read_table(path: Path, images: ImageFolder, group_column: str | None = None) -> Listing:
    """The images of a table with a header line, of comma, semicolon or tab.

    Two kinds are understood, by their columns: a file and a label, and a file and a column of 0 and
    1 per class, as the ground truth of ISIC. Of the table of a known data set, such as ChestX-ray8,
    the rows are kept that have a single label, and one that belongs to the data set's task. Where
    labels are numbers and another column has a name for each, the names are taken. Files may be
    without their ending. Rows with several labels joined by "|" are left out.

    Args:
        path: The file, whose ending is .csv or .tsv.
        images: Folder in which its images are looked up.
        group_column: Column of the subjects that images show, see ``choose_group_column``.

    Raises:
        FewShotError: The file is not such a table, a row has no label, images are missing or
            ambiguous, or there is no such column of groups.
    """
    table = _read(path)
    file = _file_column(table, images)
    labels = table.positions(_label_columns())
    labels = [at for at in labels if at != file]
    classes = _known_one_hot_columns(table)
    if not classes and not labels:
        classes = _one_hot_columns(table, file)
    if classes:
        pairs = [(cells[file], _one_hot(table, line, cells, classes)) for line, cells in table.rows]
        note = _columns_note(table, file, [table.header[at] for at in classes])
        return _grouped(table, (file, *classes), images, (pairs, table.rows, note), group_column)
    if not labels:
        raise _no_column(table, _label_columns(), "label")
    label = _label_column(table, file, labels)
    pairs, rows, note = _labelled(table, file, label)
    note = _columns_note(table, file, [table.header[label]]) + note
    return _grouped(table, (file, label), images, (pairs, rows, note), group_column)


def _grouped(
    table: _Table,
    taken: Sequence[int],
    images: ImageFolder,
    listed: tuple[list[Pair], list[Row], tuple[str, ...]],
    group_column: str | None,
) -> Listing:
    """The listing with the groups of its images; ``listed`` are they, their rows, and notes."""
    pairs, rows, notes = listed
    labels = [label for _, label in pairs]
    at = choose_group_column(table.path, table.header, labels, group_column)
    if at is None:
        if group_column is None:
            notes += subjects_note(
                table.path, table.header, taken, lambda at: [cells[at] for _, cells in rows]
            )
        return images.resolve(pairs)._replace(notes=notes)
    names = [name for name, _ in pairs]
    values = [cells[at] for _, cells in rows]
    groups, note = read_groups(table.path, table.header[at], names, values)
    listing = images.resolve(pairs, groups)
    return listing._replace(notes=(*notes, note), group_column=table.header[at])


def _known_tables() -> list[KnownTable]:
    return [each.table for each in known_sets().values() if each.table is not None]


def _file_columns() -> list[str]:
    """The names of columns of files, the likelier first."""
    own = [plain_column(each.file) for each in _known_tables() if each.file]
    return list(dict.fromkeys((*_FILE_COLUMNS, *own)))


def _label_columns() -> list[str]:
    """The names of columns of labels, the likelier first."""
    own = [plain_column(each.label) for each in _known_tables() if each.label]
    return list(dict.fromkeys((*_LABEL_COLUMNS, *own)))


def _known_one_hot_columns(table: _Table) -> list[int]:
    """The columns of 0 and 1 of a known data set, where the table has all of them."""
    for each in _known_tables():
        if each.one_hot and set(each.one_hot) <= set(table.header):
            return [table.header.index(name) for name in each.one_hot]
    return []


def _known_labels(table: _Table, label: int) -> tuple[str, ...]:
    """The labels that are kept of a known data set's table; none where all are."""
    for each in _known_tables():
        is_label = table.header[label].lower() == each.label.lower()
        if each.kept and is_label and table.positions([plain_column(each.file)]):
            return each.kept
    return ()


def _read(path: Path) -> _Table:
    text = read_document(path, "data", at_most=LIST_BYTES)
    header: list[str] = []
    rows: list[Row] = []
    for line, cells in parse_rows(path, text, "data", find_delimiter(text)):
        # Some tables, that of ChestX-ray8 among them, end lines with a comma.
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if not header:
            header = cells
        elif len(cells) == len(header):
            rows.append((line, cells))
        else:
            raise FewShotError(
                f"{_DATA}: line {line} of {path} has {len(cells)} columns, its header {len(header)}"
            )
    return _Table(path, header, rows)


def _no_column(table: _Table, known: Sequence[str], what: str) -> FewShotError:
    return FewShotError(
        f"{_DATA}: {table.path} has no column of {what}s: its first line must name one of "
        f"{', '.join(known)}; it names {', '.join(table.header) or 'nothing'}"
    )


def _file_column(table: _Table, images: ImageFolder) -> int:
    """The column whose entries are files: of those with a usual name, or else of all."""
    sample = table.rows[:: max(1, len(table.rows) // _SAMPLE)]

    def found(at: int) -> int:
        return sum(bool(cells[at]) and images.has(cells[at]) for _, cells in sample)

    known = table.positions(_file_columns())
    if known:
        return max(known, key=found) if len(known) > 1 else known[0]
    for at in range(len(table.header)):
        if sample and found(at) == len(sample):
            return at
    raise _no_column(table, _file_columns(), "file")


def _label_column(table: _Table, file: int, known: Sequence[int]) -> int:
    """The first column of labels, or one that has a name for each of its numbers."""
    first = table.column(known[0])
    if not _are_numbers(first):
        return known[0]
    ids = table.positions(_file_columns())
    others = [at for at in range(len(table.header)) if at not in (file, *known, *ids)]
    named = [at for at in (*known[1:], *others) if not _are_numbers(table.column(at))]
    for at in named:
        names = table.column(at)
        # With an image a class, every column has as many names as there are numbers.
        is_class = at in known or len(set(names)) < len(names)
        if is_class and len(set(first)) == len(set(names)) == len(
            set(zip(first, names, strict=True))
        ):
            return at
    for at in named:
        if at in known:
            raise FewShotError(
                f"{_DATA}: {table.path} has numbers in column {table.header[known[0]]!r} and names "
                f"in column {table.header[at]!r} that don't correspond one to one; rename the "
                "column that is not meant"
            )
    return known[0]


def _are_numbers(values: Sequence[str]) -> bool:
    return all(re.fullmatch(r"[+-]?\d+([.,]0*)?", value) for value in values)


def _labelled(
    table: _Table, file: int, label: int
) -> tuple[list[Pair], list[Row], tuple[str, ...]]:
    """Each image and its class, of the rows that have one, these rows, and a note on the others."""
    pairs: list[Pair] = []
    rows: list[Row] = []
    joint = 0
    for line, cells in table.rows:
        name, given = cells[file], cells[label]
        if not name or not given:
            raise FewShotError(f"{_DATA}: line {line} of {table.path} lacks a file or a label")
        if given.lower() in MISSING:
            raise FewShotError(
                f"{_DATA}: line {line} of {table.path} has the label {given!r}, which stands for "
                "none; delete the line, or rename the class if it is one"
            )
        if len(given.split(_JOINT)) > 1:
            joint += 1
        else:
            pairs.append((name, class_name(given)))
            rows.append((line, cells))
    if known := _known_labels(table, label):
        rows = [row for row, pair in zip(rows, pairs, strict=True) if pair[1] in known]
        kept = [pair for pair in pairs if pair[1] in known]
        return (
            kept,
            rows,
            (
                f"{table.path}: {len(kept)} of {len(table.rows)} images kept, those with a single "
                f"label that is one of {', '.join(known)}",
            ),
        )
    if joint and not pairs:
        raise FewShotError(
            f"{_DATA}: all rows of {table.path} have several labels, joined by {_JOINT}; images of "
            "one class each are needed"
        )
    if joint:
        several = f"{joint} of {len(table.rows)} rows with several labels, joined by {_JOINT}"
        return pairs, rows, (f"left out of {table.path}: {several}",)
    return pairs, rows, ()


def _one_hot_columns(table: _Table, file: int) -> list[int]:
    """The columns of 0 and 1, if there are several."""
    columns = []
    for at in range(len(table.header)):
        flags = [_flag(value) is not None for value in table.column(at)]
        if at == file or not flags or sum(flags) < _MOSTLY * len(flags):
            continue
        if not all(flags):
            line, cells = table.rows[flags.index(False)]
            raise FewShotError(
                f"{_DATA}: line {line} of {table.path} has {cells[at]!r} in column "
                f"{table.header[at]!r}, which otherwise holds 0 and 1"
            )
        columns.append(at)
    return columns if len(columns) > 1 else []


def _one_hot(table: _Table, line: int, cells: Sequence[str], columns: Sequence[int]) -> str:
    flags = [_flag(cells[at]) for at in columns]
    if Counter(flags) == Counter({True: 1, False: len(flags) - 1}):
        return class_name(table.header[columns[flags.index(True)]])
    raise FewShotError(
        f"{_DATA}: line {line} of {table.path} must have 1 in one of the columns "
        f"{', '.join(table.header[at] for at in columns)}, and 0 in the others"
    )


def _flag(value: str) -> bool | None:
    """The truth of 0 or 1, also where they are written as fractions; ``None`` of all else."""
    try:
        return {0.0: False, 1.0: True}.get(float(value.replace(",", ".")))
    except ValueError:
        return None


def _columns_note(table: _Table, file: int, labels: Sequence[str]) -> tuple[str, ...]:
    """A note on which columns were taken, where there was a choice."""
    if len(table.header) == 2:
        return ()
    plural = "s" if len(labels) > 1 else ""
    return (
        f"{table.path}: images are those of column {table.header[file]}, classes those of "
        f"column{plural} {', '.join(labels)}",
    )
