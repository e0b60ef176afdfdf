"""The results, as a JSON file that grows while the program runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import click
import torch

from tir_kernels.__main__ import processor, versions
from tir_kernels.allocator import keeps_freed_memory
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.documents import parse_json, read_document
from tir_kernels.fewshot.run.folder import write_json
from tir_kernels.files import MIB, read_text

from .counting import Cost

Record = dict[str, Any]

_MOST_BYTES = 256 * MIB  # a whole run has about one
_NUMBER = (int, float, NoneType)
_TYPES = {
    "suite": str,
    "operator": str,
    "implementation": str,
    "device": str,
    "dtype": str,
    "shape": dict,
    "direction": str,
    "ms": _NUMBER,
    "gbps": _NUMBER,
    "tflops": _NUMBER,
    "fraction_of_bound": _NUMBER,
}
# Beside these a record has "environment", and where they apply "mib" (peak memory), "unavailable"
# (why an implementation could not take part), "skipped" (why it was tried and left out) or "wrong"
# (how its result was off). Those of whole runs have "episodes", "episodes_per_hour" and "accuracy".
KEYS = tuple(_TYPES)
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
    found = {
        **case,
        "implementation": implementation,
        "ms": ms,
        "gbps": cost.bytes / ms / 1e6 if rated else None,
        "tflops": cost.flops / ms / 1e9 if rated else None,
        "fraction_of_bound": None if ms is None or bound is None else bound / ms,
    }
    return {key: found[key] for key in KEYS} | extra


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
        self.records: list[Record] = []
        if path is not None:
            require_writable(path)
            self.records = load_records(path, new_ok=True)
            self._write()  # what forbids it shows before anything is measured

    def finished(self, key: tuple) -> set[str]:
        """Implementations that need not be tried again for this case.

        One that was wrong or unavailable is, and so is a case that was left out as a whole.
        """
        case = [record for record in self.records if case_key(record) == key]
        if not any(record["ms"] is not None or "mib" in record for record in case):
            return set()
        return {r["implementation"] for r in case if not {"wrong", "unavailable"} & set(r)}

    def replace_case(self, key: tuple, records: Iterable[Record]) -> None:
        """Put the records of a case in place of those it had."""
        self.records = [*(r for r in self.records if case_key(r) != key), *records]
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        try:
            write_json(self.path.resolve(), self.records)  # a link stays one
        except FewShotError as error:
            raise click.ClickException(f"{error}; choose another file") from error


def require_writable(path: Path) -> None:
    """Make sure that a file can be written, or written anew, without touching it.

    Raises:
        click.ClickException: It cannot; the message says why.
    """
    target, why = path.resolve(), ""
    protected = [p for p in (target, target.parent) if p.exists() and not os.access(p, os.W_OK)]
    if target.exists() and not target.is_file():
        why = "it is not a regular file; choose another file"
    elif not target.parent.is_dir():
        why = "its folder does not exist; make it first"
    elif protected:
        why = f"{protected[0]} is write-protected; choose another file"
    if why:
        raise click.ClickException(f"cannot write {path}: {why}")


def load_records(path: Path, *, new_ok: bool = False) -> list[Record]:
    """The records of a file.

    Args:
        path: The file.
        new_ok: Whether it may be missing or empty, and then has none.

    Raises:
        click.ClickException: It cannot be read, or holds something else.
    """
    try:
        text = read_document(path, "results", at_most=_MOST_BYTES)
        records = [] if new_ok and not text.strip() else parse_json(path, text, "results")
    except FewShotError as error:
        if new_ok and isinstance(error.__cause__, FileNotFoundError):
            return []
        raise click.ClickException(f"{error}; choose another file") from error
    if isinstance(records, list) and all(map(_is_record, records)):
        return records
    raise click.ClickException(f"{path} is no list of benchmark records; choose another file")


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(key, ...), kind) for key, kind in _TYPES.items())
        and all(isinstance(size, int) for size in record["shape"].values())
        and isinstance(record.get("environment", {}), dict)
    )


def environment(device: str) -> dict[str, str]:
    """Versions, commit and device of this process, without which a time means nothing."""
    found = versions() | {"commit": _commit(), "torch": torch.__version__}
    facts = {name: found[name] for name in ("tir_kernels", "commit", "torch", "triton", "python")}
    if device == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
    memory = "kept" if keeps_freed_memory() else "given back"
    return facts | {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "freed memory": memory,
    }


def _commit(root: Path = Path(__file__).parents[1]) -> str:
    """Short hash, with "+" where the working tree has changes.

    Where a copy of the sources came without .git, what TIR_COMMIT or a file COMMIT beside them
    says; else "unknown".
    """
    if (root / ".git").exists():  # a repository further up is another one
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        with contextlib.suppress(OSError):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if found := result.stdout.strip():
                return found
    if told := os.environ.get("TIR_COMMIT", "").strip():
        return told
    try:
        lines = read_text(root / "COMMIT", at_most=1000).split()
    except (OSError, ValueError):
        return "unknown"
    return lines[0] if lines else "unknown"
