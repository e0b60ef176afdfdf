"""The results, as a JSON file that grows while the program runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from .counting import Cost

Record = dict[str, Any]

KEYS = (
    "suite",
    "operator",
    "implementation",
    "device",
    "dtype",
    "shape",
    "direction",
    "ms",
    "gbps",
    "tflops",
    "fraction_of_bound",
)
# Beside these a record has "environment", and where they apply "mib" (peak memory), "unavailable"
# (why an implementation could not take part), "skipped" (why it was tried and left out) or "wrong"
# (how its result was off). Those of whole runs have "episodes", "episodes_per_hour" and "accuracy".
_IDENTITY = ("suite", "operator", "device", "dtype", "shape", "direction")


def make_record(
    case: Mapping[str, Any],
    implementation: str,
    *,
    ms: float | None = None,
    cost: Cost | None = None,
    bound: float | None = None,
    **extra: Any,
) -> Record:
    """One line of the results.

    Args:
        case: Suite, operator, device, dtype, shape and direction.
        implementation: Its name.
        ms: Median time in milliseconds.
        cost: Useful work of the call.
        bound: Milliseconds below which that work cannot be done.
        **extra: Further keys.
    """
    rated = ms is not None and cost is not None
    return {
        **{key: case[key] for key in _IDENTITY[:2]},
        "implementation": implementation,
        **{key: case[key] for key in _IDENTITY[2:]},
        "ms": ms,
        "gbps": cost.bytes / ms / 1e6 if rated else None,
        "tflops": cost.flops / ms / 1e9 if rated else None,
        "fraction_of_bound": bound / ms if ms is not None and bound is not None else None,
        **extra,
    }


def case_key(record: Mapping[str, Any]) -> tuple:
    """What records measured side by side have in common."""
    return tuple(
        tuple(sorted(record[key].items())) if key == "shape" else record[key] for key in _IDENTITY
    )


class RecordFile:
    """Records in memory, and in a file where a path is given.

    Every change replaces the file as a whole, so that an interrupted run leaves it readable.

    Raises:
        click.ClickException: The file exists and is no list of records.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._records = [] if path is None else load_records(path, missing_ok=True)
        if path is not None:
            self._write()  # an unwritable place shows before anything is measured

    @property
    def records(self) -> list[Record]:
        return list(self._records)

    def finished(self, key: tuple) -> set[str]:
        """Implementations that need not be tried again for this case.

        One that was wrong or unavailable is, and so is a case that was left out as a whole.
        """
        case = [record for record in self._records if case_key(record) == key]
        if not any(record["ms"] is not None or "mib" in record for record in case):
            return set()
        return {r["implementation"] for r in case if not {"wrong", "unavailable"} & set(r)}

    def replace_case(self, key: tuple, records: Iterable[Record]) -> None:
        """Put the records of a case in place of those it had."""
        self._records = [r for r in self._records if case_key(r) != key]
        self._records.extend(records)
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        lines = ",\n".join(json.dumps(record) for record in self._records)
        unfinished = self.path.with_name(self.path.name + ".part")
        try:
            unfinished.write_text(f"[\n{lines}\n]\n")
            os.replace(unfinished, self.path)
        except OSError as error:
            raise click.ClickException(f"cannot write {self.path}: {error.strerror}") from error


def load_records(path: Path, *, missing_ok: bool = False) -> list[Record]:
    """The records of a file.

    Raises:
        click.ClickException: There is no such file, or it holds something else.
    """
    if missing_ok and not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise click.ClickException(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and set(KEYS) <= set(record) for record in records
    ):
        raise click.ClickException(f"{path} is no list of benchmark records; choose another file")
    return records
