"""The rows of an output: their columns, their text, and a file that they are appended to."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.names import shown_name
from tir_kernels.fewshot.run.appended import sync_folder
from tir_kernels.files import open_regular
from tir_kernels.text import setting

Cell = str | float
Row = Sequence[Cell]

# What makes a spreadsheet run a cell as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# A killed process loses nothing that it wrote; this is for machines that lose their power.
_SYNC_SECONDS = 5


@dataclass(frozen=True)
class Columns:
    """What is written of each image.

    Args:
        labels: The C classes.
        top: How many of the likeliest are named.
        probabilities: Whether those of all classes follow.
    """

    labels: tuple[str, ...]
    top: int = 1
    probabilities: bool = False

    @property
    def header(self) -> list[str]:
        """The names of the columns."""
        names = ["image", "label", "probability"]
        for place in range(2, self.top + 1):
            names += [f"label_{place}", f"probability_{place}"]
        if self.probabilities:
            names += [f"probability:{shown_name(label)}" for label in self.labels]
        return names

    def rows(self, names: Sequence[str], probabilities: Tensor) -> Iterator[Row]:
        """The rows of N images with probabilities (N, C)."""
        # Not topk: of equal ones the first class comes first, on any device.
        order = probabilities.argsort(dim=1, descending=True, stable=True)[:, : self.top]
        found = probabilities.gather(1, order)
        for n, name in enumerate(names):
            row: list[Cell] = [shown_name(name)]
            for at, probability in zip(order[n].tolist(), found[n].tolist(), strict=True):
                row += [shown_name(self.labels[at]), probability]
            if self.probabilities:
                row += probabilities[n].tolist()
            yield row


def as_csv(rows: Iterable[Row], *, is_exact: bool = False) -> str:
    """Rows as lines of CSV, quoted as Python's ``csv`` does.

    Args:
        rows: The rows.
        is_exact: Write what reads back as the same text and float32; else what a person is to read,
            with six digits, and no text that a spreadsheet would run as a formula.
    """
    lines = []
    for row in rows:
        line = io.StringIO(newline="")
        # By its own line end, since Python quotes no other; lines then end as programs here expect.
        csv.writer(line).writerow([_cell(cell, is_exact) for cell in row])
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def written(name: str, *, is_exact: bool) -> str:
    """The first cell of an image's row, as it is read back."""
    return _cell(shown_name(name), is_exact)


def _cell(cell: Cell, is_exact: bool) -> str:
    if isinstance(cell, str):
        return f"'{cell}" if cell.startswith(_FORMULA) and not is_exact else cell
    return f"{cell:.9g}" if is_exact else f"{cell:.6g}"


def read_rows(path: Path, at_most: int | None = None) -> Iterator[list[str]]:
    """The rows of a CSV file, its header first; a half-written one at the end is left out.

    Args:
        path: The file.
        at_most: Bytes that are read; ``None``: up to the last whole row.

    Raises:
        FewShotError: It can't be read.
    """
    try:
        with open_regular(path) as file:
            end = _whole(file) if at_most is None else at_most
            file.seek(0)
            text = io.TextIOWrapper(io.BufferedReader(_Part(file, end)), "utf-8", newline="")
            yield from csv.reader(text, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error


class _Part(io.RawIOBase):
    """The first bytes of a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._file.read(min(len(buffer), self._left))
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)


def _whole(file: Iterable[bytes]) -> int:
    """The bytes of a file's whole rows: up to the last line feed that is in no quotes."""
    whole = size = quotes = 0
    for line in file:
        size += len(line)
        quotes += line.count(b'"')
        if line.endswith(b"\n") and quotes % 2 == 0:
            whole = size
    return whole


class RowFile:
    """A CSV file that this process alone appends rows to, from its last whole row on.

    Args:
        path: The file; it is created with its header if missing or empty.
        header: The names of its columns.
        is_exact: As for ``as_csv``.

    Raises:
        FewShotError: It can't be read or written, or has another header.
    """

    def __init__(self, path: Path, header: Sequence[str], *, is_exact: bool = False) -> None:
        self.path = path
        self._is_exact = is_exact
        self._file = -1
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags, 0o644)
            with open_regular(path) as file:
                self._size = _whole(file)
            os.ftruncate(self._file, self._size)
            sync_folder(path.parent)
        except OSError as error:
            self._fail(error)
        self._synced = time.monotonic()
        found = next(read_rows(path, self._size), None)
        if found is None:
            self.append([header])
        elif found != [_cell(name, is_exact) for name in header]:
            raise FewShotError(
                f"{path} has other columns than those that are to be written; name another file"
            )

    def close(self) -> None:
        """Close the file, once it is on the disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows; when this returns, they outlive the process.

        Raises:
            FewShotError: They can't be written; the rows before them stay.
        """
        rest = as_csv(rows, is_exact=self._is_exact).encode()
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._fail(error)
        self._size += size

    def _fail(self, error: OSError) -> None:
        raise FewShotError(
            f"can't write {self.path}: {first_line(error)}; what is finished is kept: put that "
            "right and give the same command again"
        ) from error


class KnownNames:
    """The images that have a row already, as 8 bytes each.

    Two of ten million names have the same 8 bytes with a probability of 3e-6.

    Args:
        names: Their names, an image that was named twice twice.
    """

    def __init__(self, names: Iterable[str]) -> None:
        digests = array("Q", map(digest, names))
        found = np.frombuffer(digests, dtype=np.uint64) if digests else np.empty(0, np.uint64)
        self._digests, self._counts = np.unique(found, return_counts=True)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def take(self, name: str) -> bool:
        """Whether there is a row of that name that was not taken yet."""
        if not len(self._digests):
            return False
        value = np.uint64(digest(name))
        at = int(np.searchsorted(self._digests, value))
        if at == len(self._digests) or self._digests[at] != value or self._counts[at] == 0:
            return False
        self._counts[at] -= 1
        return True


def digest(name: str) -> int:
    """A number of 8 bytes for a name, the same in every process and on every machine."""
    content = name.encode("utf-8", "surrogatepass")  # a name's bytes that are not UTF-8
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def require_finite(names: Sequence[str], probabilities: Tensor) -> None:
    """Refuse probabilities (N, C) that are no numbers.

    Raises:
        FewShotError: An image has some.
    """
    is_finite = torch.isfinite(probabilities).all(1)
    if not is_finite.all():
        name = shown_name(names[int(is_finite.int().argmin())])
        raise FewShotError(
            f"the classifier's numbers for {name} overflow; pass {setting('precision', 'float32')}"
        )
