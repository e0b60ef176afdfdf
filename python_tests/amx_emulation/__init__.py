"""The CPU kernels for the matrix unit (AMX) on machines without it: its instructions in plain C++.

The vectors beside them still need AVX-512 BF16.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = ROOT / "csrc"
OPERATIONS = ("attention_forward", "attention_backward", "attention_statistics", "relevance")
NAME = "tir_emulated_amx"
VECTORS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")


def missing() -> str:
    """The reason that the kernels cannot be compiled here, or nothing."""
    if shutil.which("g++") is None:
        return "needs g++"
    return "" if importlib.util.find_spec("pybind11") else "needs pybind11"


class EmulatedKernels:
    """The module of the CPU kernels, with those that multiply by tiles in place of their like."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels
        self._emulated = _load()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._emulated if name in OPERATIONS else self._kernels, name)


@functools.cache
def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, _build())
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build() -> Path:
    """Compile what changed since the last time; gives the module's path."""
    import pybind11

    kernels = SOURCE / "cpu" / "kernels"
    sources = [
        HERE / "bindings.cpp",
        *(SOURCE / "cpu" / name for name in ("parallel.cpp", "keys.cpp")),
        *(kernels / f"{name}.cpp" for name in OPERATIONS),
    ]
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off",
        *(f"-m{name}" for name in VECTORS), "-mprefer-vector-width=512",
        "-include", str(HERE / "emulated_tiles.h"), "-D__AMX_BF16__", "-DTIR_ARCH=amx",
        f"-I{SOURCE}", f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'cpu'}",
        f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}",
    ]  # fmt: skip
    read = sorted({*SOURCE.glob("*.h"), *SOURCE.glob("include/**/*.h"), *HERE.glob("*.h")})
    read += sorted({*SOURCE.glob("cpu/**/*.h"), *sources})
    content = repr(flags).encode() + b"".join(path.read_bytes() for path in read)
    folder = ROOT / "build" / f"amx-emulation-{hashlib.sha256(content).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"{NAME}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            unfinished = folder / "unfinished.so"
            command = ["g++", *flags, *map(str, sources), "-shared", "-o", str(unfinished)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(unfinished, module)
    return module
