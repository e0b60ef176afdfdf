"""The results, as a JSON file that grows while the program runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from tir_kernels import files
from tir_kernels.fewshot.strict_json import decode_json

from .counting import Cost

Record = dict[str, Any]

_MOST_BYTES = 256 * files.MIB  # a whole run has about one

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
    """The fields that records measured side by side have in common."""
    return tuple(
        tuple(sorted(record[key].items())) if key == "shape" else record[key] for key in _IDENTITY
    )


class RecordFile:
    """Records in memory, and in a file where a path is given.

    Every change replaces the file as a whole, so that an interrupted run leaves it readable.

    Raises:
        click.ClickException: The file holds something that is no list of records, or cannot be read
            or written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._records = [] if path is None else load_records(path, new_ok=True)
        if path is not None:
            require_writable(path)
            self._write()  # what forbids it shows before anything is measured

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
        target = self.path.resolve()  # a link stays one
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            with open(unfinished, "x") as file:
                file.write(f"[\n{lines}\n]\n")
            os.replace(unfinished, target)
        except FileExistsError as error:
            raise click.ClickException(f"{unfinished} is in the way; remove it") from error
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _cannot("write", self.path, error) from error
            raise


def require_writable(path: Path) -> None:
    """Make sure that a file can be written, or written anew, without touching it.

    Raises:
        click.ClickException: It cannot; the message says why.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "not a regular file"
        raise click.ClickException(f"cannot write {path}: it is {kind}; choose another file")
    if not target.parent.is_dir():
        raise click.ClickException(f"cannot write {path}: its folder does not exist; make it first")
    for place in filter(os.path.exists, (target, target.parent)):
        if not os.access(place, os.W_OK):
            raise click.ClickException(
                f"cannot write {path}: {place} is write-protected; choose another file"
            )


def load_records(path: Path, *, new_ok: bool = False) -> list[Record]:
    """The records of a file.

    Args:
        path: The file.
        new_ok: Whether it may be missing or empty, and then has none.

    Raises:
        click.ClickException: It cannot be read, or holds something else.
    """
    try:
        text = files.read_text(path, at_most=_MOST_BYTES)
        if new_ok and not text.strip():
            return []
        records = decode_json(text.encode())
    except OSError as error:
        if new_ok and isinstance(error, FileNotFoundError):
            return []
        raise _cannot("read", path, error) from error
    except ValueError as error:
        raise click.ClickException(
            f"{path} is no JSON file of records ({error}); choose another file"
        ) from error
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise click.ClickException(f"{path} is no list of benchmark records; choose another file")
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not set(KEYS) <= set(record):
        return False
    words = ("suite", "operator", "implementation", "device", "dtype", "direction")
    numbers = ("ms", "gbps", "tflops", "fraction_of_bound")
    return (
        all(isinstance(record[key], str) for key in words)
        and all(record[key] is None or isinstance(record[key], int | float) for key in numbers)
        and all(isinstance(record.get(key, {}), dict) for key in ("shape", "environment"))
        and all(isinstance(size, int) for size in record["shape"].values())
    )


def _cannot(do: str, path: Path, error: OSError) -> click.ClickException:
    return click.ClickException(f"cannot {do} {path}: {error.strerror}; choose another file")
