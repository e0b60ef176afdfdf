"""Proofs that take minutes and follow from files alone: done once for each content of the files.

A proof that was done leaves a file below build/, named by a digest of all that it depends on. A
fresh clone has none, so there every proof is done; ``TIR_PROVE=again`` does all of them anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "proofs"


def place(name: str, files: Iterable[Path], *facts: object) -> Path:
    """Where a proof leaves its result.

    Args:
        name: The proof's.
        files: All that it reads; their contents count, and their names in the repository.
        facts: What else it depends on, such as flags and compilers' versions.
    """
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(set(files)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    return FOLDER / f"{name}-{digest.hexdigest()[:16]}"


def is_done(result: Path) -> bool:
    """Whether a proof was done before and need not be done again."""
    return result.exists() and os.environ.get("TIR_PROVE") != "again"


def keep(result: Path, content: str) -> None:
    """Write a proof's result, as a whole or not at all."""
    result.parent.mkdir(parents=True, exist_ok=True)
    unfinished = result.with_name(f"{result.name}.{os.getpid()}.part")
    unfinished.write_text(content)
    unfinished.replace(result)


@contextlib.contextmanager
def once(result: Path) -> Iterator[None]:
    """Do the proof in the block, or skip the test where it was done before."""
    if is_done(result):
        shown = result.relative_to(ROOT)
        pytest.skip(f"proved before, with the same files ({shown}); TIR_PROVE=again proves it anew")
    yield
    keep(result, "passed\n")


def sources(*folders: str) -> list[Path]:
    """All source files below folders of the repository, and files named themselves."""
    kinds = (".py", ".h", ".cuh", ".cu", ".cpp", ".npz")
    given = [ROOT / folder for folder in folders]
    if missing := [path for path in given if not path.exists()]:
        raise FileNotFoundError(f"a proof reads {missing[0]}, which does not exist")
    below = [p for folder in given if folder.is_dir() for p in folder.rglob("*")]
    return [p for p in (*given, *below) if p.is_file() and p.suffix in kinds]


def cuda_sources() -> list[Path]:
    """The CUDA kernels, what they include, and their emulation: all of csrc but the CPU kernels."""
    return [path for path in sources("csrc") if (ROOT / "csrc" / "cpu") not in path.parents]


def operator_sources() -> list[Path]:
    """All of the package that an operator's call runs through: other rooms are built upon it."""
    top = (ROOT / "tir_kernels").glob("*.py")
    return [*sources("tir_kernels/operators", "tir_kernels/backends"), *top]


def version_of(*command: str) -> str:
    """The words in which a program tells its version."""
    return subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
