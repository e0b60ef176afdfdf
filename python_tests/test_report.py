"""``python -m tir_kernels`` names every backend, and the package imports without its extras."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow  # each starts Python anew


def run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True
    ).stdout


def test_report_names_versions_backends_and_machine() -> None:
    report = run("-m", "tir_kernels")
    for word in ("tir_kernels", "torch", "triton", "reference", "cpu", "cuda", "processor", "nvcc"):
        assert f"  {word} " in report
    if not torch.cuda.is_available():
        assert "does not run here: " in report


def test_import_needs_neither_triton_nor_open_clip() -> None:
    run(
        "-c",
        "import sys; sys.modules['triton'] = sys.modules['open_clip'] = None\n"
        "import tir_kernels\n"
        "assert tir_kernels.available_backends()['triton']",
    )
