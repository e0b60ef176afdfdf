"""nvcc and NVIDIA's disassembler: what is compiled, and what is read of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from .counts import KernelCounts, count
from .listing import kernels, readable

ROOT = Path(__file__).resolve().parents[2]
# Sources, types of elements, widths of heads.
SOURCES = (
    ("attention_forward", "bfloat16", 64),
    ("attention_backward", "bfloat16", 64),
    ("attention_backward", "bfloat16", 80),
    ("attention_statistics", "bfloat16", 64),
    ("relevance", "bfloat16", 64),  # it has no heads
    ("relevance", "float", 64),
    ("selection", "bfloat16", 64),  # it has no type of elements either
)
ARCHITECTURE = 90
_ONE_WIDTH = Path(__file__).parent / "one_width.cu"
_RELEASE = re.compile(r"release (\d+\.\d+)")
_USAGE = re.compile(r"^ Function (?P<symbol>\S+):\n\s+(?P<numbers>.*)$", re.MULTILINE)


class ToolError(click.ClickException):
    """A program is missing, or it failed: its own words."""


def nvcc() -> Path:
    """The CUDA compiler, of CUDA_HOME or on PATH."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if found is None:
        place = f"CUDA_HOME={home}" if home else "PATH"
        raise ToolError(f"no nvcc in {place}: install the CUDA toolkit, or put nvcc on PATH")
    return Path(found)


def disassembler(name: str) -> Path:
    """``cuobjdump`` or ``nvdisasm``: of CUDA_HOME, on PATH, or those that Triton brings."""
    home = os.environ.get("CUDA_HOME")
    for path in (str(Path(home) / "bin"), None) if home else (None,):
        if found := shutil.which(name, path=path):
            return Path(found)
    try:
        import triton
    except ImportError:
        pass
    else:
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin" / name
        if bundled.exists():
            return bundled
    raise ToolError(f"no {name}, neither of the CUDA toolkit nor of Triton: install one of them")


def release(compiler: Path) -> str:
    """Text such as "13.0"; other releases of the compiler count otherwise."""
    found = _RELEASE.search(_run(compiler, "--version"))
    if found is None:
        raise ToolError(f"{compiler} --version names no release")
    return found[1]


def compile_kernels(folder: Path, *, architecture: int = ARCHITECTURE) -> list[Path]:
    """A cubin for each of ``SOURCES``, with the instances that the package launches.

    Args:
        folder: Where they are written.
        architecture: 90 for capability 9.0.
    """
    compiler = nvcc()

    def compiled(job: tuple[str, str, int]) -> Path:
        source, element, head_dim = job
        cubin = folder / f"{source}-{element}-{head_dim}.cubin"
        defines = (
            f"-DTIR_ELEMENT={element}",
            f"-DTIR_HEAD_DIM={head_dim}",
            f'-DTIR_SOURCE="cuda/{source}.cu"',
        )
        include = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
        # As setup.py compiles them.
        flags = ("-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{architecture}", "-cubin")
        _run(compiler, *flags, *include, *defines, "-o", cubin, _ONE_WIDTH)
        return cubin

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, SOURCES))


def counts_of(files: Iterable[Path], architecture: int = ARCHITECTURE) -> dict[str, KernelCounts]:
    """Counts of all kernels in cubins, objects or libraries, by their readable names.

    Args:
        files: Each a cubin, or what the build makes: an object, or the package's compiled module.
        architecture: Of what an object holds for several architectures, that which is read.
    """
    found: dict[str, KernelCounts] = {}
    for file in files:
        with tempfile.TemporaryDirectory() as scratch:
            for cubin in _cubins(file, architecture, Path(scratch)):
                usage = _usage(_run(disassembler("cuobjdump"), "-res-usage", cubin))
                listing = _run(disassembler("nvdisasm"), "-c", cubin)
                for symbol, code in kernels(listing).items():
                    found[readable(symbol)] = count(code, usage[symbol])
    return dict(sorted(found.items()))


def _cubins(file: Path, architecture: int, scratch: Path) -> list[Path]:
    if file.suffix == ".cubin":
        return [file]
    _run(disassembler("cuobjdump"), "-xelf", "all", file.resolve(), cwd=scratch)
    cubins = sorted(scratch.glob(f"*.sm_{architecture}.cubin"))
    if not cubins:
        raise ToolError(
            f"{file} holds no code for sm_{architecture}: build it with "
            f"TIR_CUDA_ARCHS={architecture}, or choose another --architecture"
        )
    return cubins


def _usage(report: str) -> dict[str, dict[str, int]]:
    """Mangled name -> ``REG``, ``STACK``, ``SHARED`` and more, of a report by cuobjdump."""
    return {
        match["symbol"]: {
            name: int(number) for name, number in re.findall(r"(\w+):(\d+)", match["numbers"])
        }
        for match in _USAGE.finditer(report)
    }


def _run(program: Path, *arguments: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ToolError(f"{program.name} failed: {said or f'exit status {done.returncode}'}")
    return done.stdout
