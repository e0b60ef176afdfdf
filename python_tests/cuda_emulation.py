"""The CUDA kernels, compiled for the CPU by csrc/emulation, as the backend "cuda-emulated".

The very same .cu files run there, one thread after the other: slow, and for small sizes. Set
TIR_EMULATION_SANITIZE=1 for AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes have to
be preloaded, and TIR_EMULATION_ORDER to an integer for another order of threads (0: ascending, 1:
descending, else random).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tir_kernels.backends import cuda
from tir_kernels.backends.cuda import Launcher
from tir_kernels.operators import choose as dispatch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc"
NAME = "cuda-emulated"
ELEMENTS = ("float", "float16", "bfloat16")
# Small shared memory makes rows pass in chunks that a whole GPU would keep.
DEVICES = {"a whole GPU": (4, 160 * 1024), "little shared memory": (4, 99 * 1024)}


def missing() -> str:
    """The reason that the kernels cannot be compiled here, or nothing."""
    for tool in ("g++", "ninja"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    if importlib.util.find_spec("pybind11") is None:
        return "needs pybind11"
    return ""


def is_sanitized() -> bool:
    return os.environ.get("TIR_EMULATION_SANITIZE") == "1"


def flags_for(source: Path) -> list[str]:
    import pybind11

    flags = [
        # The checks that sanitizers ask for take -O1 twice as long to compile.
        "-Og" if is_sanitized() else "-O1",
        "-std=c++17", "-g1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror",
        # Kernels read and write tiles as wider words, which CUDA's compiler allows.
        "-fno-strict-aliasing",
        # Several versions of the module can be loaded side by side.
        "-fvisibility=hidden", "-fno-gnu-unique",
        f"-I{source}", f"-I{source / 'include'}",
        f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}",
    ]  # fmt: skip
    if is_sanitized():
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    return flags


def link_command() -> list[str]:
    return ["g++", "-shared", *(f for f in flags_for(SOURCE) if "sanitize" in f)]


def build() -> Path:
    """Compile what changed since the last time; gives the module's path."""
    flags = flags_for(SOURCE)
    key = hashlib.sha256(repr(flags).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"emulation-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = []
    for path in sorted(SOURCE.glob("cuda/*.cu")):
        elements = ELEMENTS if "TIR_ELEMENT" in path.read_text() else ("any",)
        steps += [(path, f"{path.stem}-{e}.o", f"-DTIR_ELEMENT={e} -x c++") for e in elements]
    for path in sorted([*SOURCE.glob("cuda/*.cpp"), *SOURCE.glob("emulation/*.cpp")]):
        # pybind11 alone is compiled for long; no kernel is among these.
        plain = "-O0 -fno-sanitize=all" if path.stem == "bindings" else ""
        steps.append((path, f"{path.parent.name}-{path.stem}.o", plain))
    module = folder / "tir_cuda_emulated.so"
    lines = [
        f"builddir = {folder}",
        "rule compile",
        f"  command = g++ {' '.join(flags)} $extra -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = {' '.join(link_command())} $in -o $out",
    ]
    for path, name, extra in steps:
        lines += [f"build {folder / name}: compile {path}", f"  extra = {extra}"]
    lines.append(f"build {module}: link {' '.join(str(folder / name) for _, name, _ in steps)}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja_file = folder / "build.ninja"
        ninja_file.write_text("\n".join(lines) + "\n")
        _run(["ninja", "-f", str(ninja_file)])
    return module


def replace_object(edited: Path, element: str, folder: Path) -> Path:
    """The module with one source, of an edited copy of csrc, in place of the true one."""
    target = f"{edited.stem}-{element}.o"
    flags = [*flags_for(edited.parents[1]), f"-DTIR_ELEMENT={element}", "-x", "c++"]
    compiled = folder / target
    _run(["g++", *flags, "-c", str(edited), "-o", str(compiled)])
    others = [path for path in sorted(build().parent.glob("*.o")) if path.name != target]
    module = folder / "tir_cuda_emulated.so"
    _run([*link_command(), *map(str, others), str(compiled), "-o", str(module)])
    return module


def build_with(edit: tuple[str, str, str], source: str, element: str, folder: Path) -> Path:
    """The module with an edit: in a file of csrc/cuda, a text is replaced by another.

    Only ``source``, a name without its ending, is compiled anew, for one type of elements.
    """
    name, right, wrong = edit
    edited = folder / "csrc"
    shutil.copytree(SOURCE, edited)
    path = edited / "cuda" / name
    text = path.read_text()
    if right:
        assert text.count(right) == 1, f"{name} no longer holds {right!r}"
        path.write_text(text.replace(right, wrong))
    return replace_object(edited / "cuda" / f"{source}.cu", element, folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def load(path: Path) -> ModuleType:
    # pybind11 keeps one module of a name, so versions need names that differ.
    version = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"v{version}.tir_cuda_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all tensors that launchers make from now on, but for gradients of rows."""
    made: list[tuple[int, ...]] = []

    def record(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(*arguments: Any) -> Tensor:
            tensor = make(*arguments)
            made.append(tuple(tensor.shape))
            return tensor

        return recorded

    for name in ("_empty", "empty_result"):
        monkeypatch.setattr(cuda, name, record(getattr(cuda, name)))
    return made


class EmulatedBackend(Launcher):
    """Launches on the CPU, where there are no streams."""

    name = NAME

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = self._kernels = kernels

    def _current_stream(self, device: torch.device) -> int:
        return 0

    def _guard(self, device: torch.device) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def unavailable(self) -> str:
        return ""

    def refusal(self, device: torch.device) -> str:
        return "" if device.type == "cpu" else "emulation is for tensors on the CPU"


def register() -> EmulatedBackend:
    """Build the emulated kernels and make them a backend, once a process."""
    if NAME not in dispatch.backend_names():
        kernels = load(build())
        kernels.set_thread_order(int(os.environ.get("TIR_EMULATION_ORDER", "0")))
        dispatch.register_backend(NAME, EmulatedBackend(kernels))
    return dispatch.load_backend(NAME)
