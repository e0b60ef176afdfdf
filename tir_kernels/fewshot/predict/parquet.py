"""Predictions in a Parquet file, which is written as a whole when all rows are there.

A Parquet file ends with an index of all of it, so that one whose process was killed can't be read.
Until the end, rows lie in a CSV file beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.predict.rows import Columns, read_rows
from tir_kernels.fewshot.run.appended import sync_folder
from tir_kernels.text import setting

_GROUP = 2**16  # rows that are written at once
# Of the file of rows that was written last: it is left over where the process was killed then.
_SOURCE = b"tir_kernels.rows"


def require() -> Any:
    """PyArrow's Parquet.

    Raises:
        FewShotError: It is not installed.
    """
    try:
        import pyarrow.parquet as library
    except ImportError as error:
        raise FewShotError(
            f"{setting('out')}: Parquet files need the package pyarrow: "
            'pip install "tir_kernels[parquet]", or choose a name that ends in .csv'
        ) from error
    return library


def rows(path: Path) -> Iterator[list[str]]:
    """The image, the label and the probability of each row, as text.

    Raises:
        FewShotError: It can't be read.
    """
    library = require()
    try:
        with library.ParquetFile(path) as file:
            for batch in file.iter_batches(_GROUP, columns=["image", "label", "probability"]):
                for image, label, probability in zip(*batch.to_pydict().values(), strict=True):
                    yield [image, label, f"{probability:.9g}"]
    except (OSError, ValueError) as error:  # PyArrow's are of these kinds
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error


def drop_written(source: Path, target: Path) -> None:
    """Remove rows that are in the Parquet file already, since a process was killed in between."""
    if source.exists() and target.exists() and _source_of(target) == _identity(source):
        source.unlink()


def finish(source: Path, target: Path, columns: Columns) -> None:
    """Add rows to a Parquet file, which is there with all of them or as it was.

    Args:
        source: CSV file of the rows, which is removed.
        target: The Parquet file; it is created if missing.
        columns: Their columns.

    Raises:
        FewShotError: It can't be read or written.
    """
    import pyarrow

    library = require()
    if target.exists() and next(islice(read_rows(source), 1, None), None) is None:
        source.unlink()
        return
    types = [
        pyarrow.string() if name == "image" or name.startswith("label") else pyarrow.float32()
        for name in columns.header
    ]
    fields = list(zip(columns.header, types, strict=True))
    schema = pyarrow.schema(fields, metadata={_SOURCE: _identity(source)})
    partial = target.with_name(f".{target.name}.partial")
    try:
        with library.ParquetWriter(partial, schema) as writer:
            if target.exists():
                with library.ParquetFile(target) as before:
                    for batch in before.iter_batches(_GROUP):
                        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            found = islice(read_rows(source), 1, None)
            while some := list(islice(found, _GROUP)):
                cells = [
                    list(column) if kind == pyarrow.string() else [float(each) for each in column]
                    for kind, column in zip(types, zip(*some, strict=True), strict=True)
                ]
                arrays = [
                    pyarrow.array(each, kind) for each, kind in zip(cells, types, strict=True)
                ]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
        sync_folder(target.parent)
        source.unlink()
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise FewShotError(
            f"can't write {target}: {first_line(error)}; what is finished is kept: put that right "
            "and give the same command again"
        ) from error


def _source_of(target: Path) -> bytes | None:
    library = require()
    try:
        found = library.read_schema(target).metadata
    except (OSError, ValueError) as error:
        raise FewShotError(f"can't read {target}: {first_line(error)}") from error
    return (found or {}).get(_SOURCE)


def _identity(path: Path) -> bytes:
    status = path.stat()
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}".encode()
