"""The CPU kernels for instructions that the machine lacks, in plain C++: AVX-512 BF16 and AMX."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = ROOT / "csrc"
ARCHITECTURES = ("avx512_bf16", "amx")
OPERATIONS = (
    "attention_forward",
    "attention_backward",
    "attention_statistics",
    "relevance",
    "token_weights",
    "philox_dropout",
    "activation",
)
PLAIN = ("-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-include", str(HERE / "emulated_vectors.h"))
VECTORS = (
    "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
    "-mavx512bf16", "-mprefer-vector-width=512",
)  # fmt: skip
TILES = ("-include", str(HERE / "emulated_tiles.h"), "-D__AMX_BF16__")


def unavailable(architecture: str, machine: dict[str, bool]) -> str:
    """The reason that an architecture is not emulated; `machine`: what it runs itself."""
    if not machine.get("avx2", False):
        return "emulation needs AVX2"
    has_vectors = machine.get("avx512_bf16", False)
    if architecture == "avx512_bf16" and has_vectors:
        return f"this machine runs {architecture} itself"
    if architecture == "amx" and not has_vectors and not os.environ.get("TIR_EMULATE_AMX"):
        return "two minutes beside emulated AVX-512: set TIR_EMULATE_AMX=1"
    if shutil.which("g++") is None:
        return "needs g++"
    return "" if importlib.util.find_spec("pybind11") else "needs pybind11"


class EmulatedKernels:
    """The module of the CPU kernels, with those of an emulated architecture in place of its own."""

    def __init__(self, kernels: ModuleType, architecture: str) -> None:
        has_vectors = dict(kernels.architectures()).get("avx512_bf16", False)
        self._kernels = kernels
        self._emulated = _load(architecture, VECTORS if has_vectors else PLAIN)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._emulated if name in OPERATIONS else self._kernels, name)


@functools.cache
def _load(architecture: str, vectors: tuple[str, ...]) -> ModuleType:
    name = f"tir_emulated_{architecture}"
    spec = importlib.util.spec_from_file_location(name, _build(name, architecture, vectors))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(name: str, architecture: str, vectors: tuple[str, ...]) -> Path:
    """Compile what changed since the last time; gives the module's path."""
    import pybind11

    kernels = SOURCE / "cpu" / "kernels"
    sources = sorted(kernels.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    shared = ("parallel", "keys", "selection")
    sources += [HERE / "bindings.cpp", *(SOURCE / "cpu" / f"{name}.cpp" for name in shared)]
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off",
        *vectors, *(TILES if architecture == "amx" else ()),
        f"-DTIR_ARCH={architecture}", f"-DTIR_MODULE={name}",
        f"-I{SOURCE}", f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'cpu'}",
        f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}",
    ]  # fmt: skip
    read = sorted({*SOURCE.glob("*.h"), *SOURCE.glob("include/**/*.h"), *HERE.glob("*.h")})
    read += sorted({*SOURCE.glob("cpu/**/*.h"), *sources})
    content = repr(flags).encode() + b"".join(path.read_bytes() for path in read)
    folder = ROOT / "build" / f"{architecture}-{hashlib.sha256(content).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"{name}.so"

    def compile_source(source: Path) -> str:
        compiled = str(folder / f"{source.stem}.o")
        _run("g++", *flags, "-c", str(source), "-o", compiled)
        return compiled

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            unfinished = folder / "unfinished.so"
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                compiled = list(threads.map(compile_source, sources))
            _run("g++", "-shared", "-pthread", *compiled, "-o", str(unfinished))
            os.replace(unfinished, module)
    return module


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
