"""The facts that a time means nothing without."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import tir_kernels
from tir_kernels.__main__ import processor


def environment(device: str) -> dict[str, str]:
    """Versions, commit and device of this process."""
    facts = {
        "tir_kernels": tir_kernels.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }
    if device == "cuda":
        return facts | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
    return facts | {"processor": processor(), "threads": str(torch.get_num_threads())}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Short hash, with "+" where the working tree has changes; "unknown" outside a checkout."""
    root = str(Path(__file__).parents[1])
    command = ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"
