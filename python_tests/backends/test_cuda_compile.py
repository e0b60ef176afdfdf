"""The CUDA compiler's output: no spills, shared memory that is there, tensor cores.

The objects and the assembler's reports are those of the installed module, from build/.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("attention_forward", "attention_backward", "attention_statistics", "relevance")


@pytest.fixture(scope="module")
def folder() -> Path:
    """Where the newest build with CUDA kernels left its objects."""
    reports = sorted(
        ROOT.glob("build/native-*/cuda-selection.o.log"), key=lambda p: p.stat().st_mtime
    )
    if not reports:
        pytest.skip("the package was not built with nvcc in this source tree")
    return reports[-1].parent


@pytest.fixture(scope="module")
def disassembler() -> str:
    if path := shutil.which("cuobjdump"):
        return path
    triton = pytest.importorskip("triton", reason="neither the toolkit's cuobjdump nor Triton's")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not bundled.exists():
        pytest.skip("no cuobjdump in PATH or in Triton")
    return str(bundled)


def spills(report: str) -> list[str]:
    """Kernels of an assembler's report that keep values of registers in memory."""
    found = []
    for part in report.split("Compiling entry function ")[1:]:
        numbers = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        )
        assert numbers, f"the report has another form than expected: {part[:300]}"
        if any(int(number) for number in numbers.groups()):
            found.append(part.split("\n")[0] + ": " + numbers.group())
    return found


def test_every_architecture_is_reported(folder: Path) -> None:
    for report in set(folder.glob("cuda-*.o.log")) - {folder / "cuda-runtime.o.log"}:
        functions = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report.read_text())
        by_architecture: dict[str, int] = {}
        for _, architecture in functions:
            by_architecture[architecture] = by_architecture.get(architecture, 0) + 1
        assert by_architecture, f"{report.name} names no kernel"
        assert len(set(by_architecture.values())) == 1, (report.name, by_architecture)


def test_no_kernel_spills(folder: Path) -> None:
    spilling = [
        line for report in folder.glob("cuda-*.o.log") for line in spills(report.read_text())
    ]
    assert not spilling


def test_the_gate_sees_spills() -> None:
    report = (
        "ptxas info    : Compiling entry function 'a' for 'sm_90'\n"
        "ptxas info    : Function properties for a\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_90'\n"
        "    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
    )
    assert [line.split(":")[0] for line in spills(report)] == ["'b' for 'sm_90'"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_tensor_cores_multiply(folder: Path, disassembler: str, kernel: str) -> None:
    """float32 only where it is split into numbers that they take whole."""
    for element in ("float", "float16", "bfloat16"):
        code = subprocess.run(
            [disassembler, "-sass", folder / f"cuda-{kernel}-{element}.o"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        parts = code.split("code for sm_")[1:]
        assert parts
        for part in parts:
            products = set(re.findall(r"\bHMMA\.\S+", part))
            if element == "float":
                split = {"HMMA.1688.F32.TF32"} if kernel == "relevance" else set()
                assert products == split, "float32 would be rounded to what tensor cores take"
                continue
            suffix = ".BF16" if element == "bfloat16" else ""
            assert products == {f"HMMA.16816.F32{suffix}"}
            assert "LDSM" in part, "fragments are not read as matrices"
            assert "LDGSTS" in part, "copies to shared memory go through registers"
