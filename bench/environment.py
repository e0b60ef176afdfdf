"""The facts that a time means nothing without."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import torch

from tir_kernels import files
from tir_kernels.__main__ import processor, versions


def environment(device: str) -> dict[str, str]:
    """Versions, commit and device of this process."""
    found = versions() | {"commit": _commit(), "torch": torch.__version__}
    facts = {name: found[name] for name in ("tir_kernels", "commit", "torch", "triton", "python")}
    if device == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
    return facts | {"processor": processor(), "threads": str(torch.get_num_threads())}


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
        lines = files.read_text(root / "COMMIT", at_most=1000).split()
    except (OSError, ValueError):
        return "unknown"
    return lines[0] if lines else "unknown"
