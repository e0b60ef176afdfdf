"""Builds tir_kernels._C, the compiled kernels, through ninja.

Where nvcc is found the CUDA kernels are built too, for the architectures that TIR_CUDA_ARCHS lists
(80;90), by default for the GPUs present or else for a range of them; "none" leaves them out. Code
for 90a may use what later GPUs lack, so it runs on 9.0 alone.

Objects stay under build/, so that installing again after an edit compiles only what changed. Where
there is no C++ compiler the package installs without the module and says so; where a compiler fails
the installation fails with its message.
"""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU = Path("csrc/cpu")
KERNEL_NAMES = ("attention_forward", "attention_backward", "attention_statistics", "relevance")
ADAPTER_KERNEL_NAMES = ("dropout", "activation")
KERNELS = [CPU / "kernels" / f"{name}.cpp" for name in KERNEL_NAMES + ADAPTER_KERNEL_NAMES]
COMMON = [CPU / f"{name}.cpp" for name in ("dispatch", "keys", "parallel", "selection")]
BINDINGS = Path("csrc/bindings.cpp")
CUDA = Path("csrc/cuda")
# Each of these is compiled once for every type of elements, so that the work is shared out.
CUDA_KERNELS = [CUDA / f"{name}.cu" for name in KERNEL_NAMES]
CUDA_ELEMENTS = ("float", "float16", "bfloat16")
CUDA_COMMON = [CUDA / "runtime.cu", CUDA / "selection.cu"]
CUDA_HOST = [CUDA / "launchers.cpp", CUDA / "bindings.cpp"]
CUDA_ARCHITECTURES = (80, 90, 100)  # where no GPU says which are wanted

FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-DNDEBUG",
    # The last two warn about the vector headers of gcc 12.
    "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
    # Fused multiply-adds are written out where they are meant: the compiler's own choice could
    # differ between two copies of a loop, and with it the last bit of a result.
    "-ffp-contract=off",
]  # fmt: skip

# The kernels are compiled once for each of these; the machine picks one when it runs.
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
               "-mprefer-vector-width=512"],
}  # fmt: skip
X86_FLAGS["avx512_bf16"] = [*X86_FLAGS["avx512"], "-mavx512bf16"]
X86_FLAGS["amx"] = [*X86_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

NO_COMPILER = """
  tir_kernels: no C++ compiler was found (looked for CXX, c++, g++ and clang++).
  The package is installed without its compiled CPU kernels; the other backends work.
  To get them, install a C++17 compiler (Debian, Ubuntu: apt install g++) and install again.
"""


NO_NVCC = """
  tir_kernels: nvcc was not found (looked in CUDA_HOME and PATH).
  The package is installed without its CUDA C++ kernels; on a GPU its Triton kernels serve.
  To get them, install the CUDA toolkit, put nvcc on PATH and install again.
"""


@dataclass(frozen=True)
class Step:
    """One source file compiled to one object."""

    source: Path
    object_name: str
    flags: list[str]


@dataclass(frozen=True)
class Cuda:
    """The CUDA compiler, and the architectures that it compiles for, oldest first."""

    nvcc: str
    architectures: list[str]

    @property
    def portable(self) -> list[str]:
        """Those whose code uses nothing that later GPUs lack."""
        return [name for name in self.architectures if name.isdigit()]

    @property
    def label(self) -> str:
        """Text such as "80+PTX;90"."""
        with_ptx = self.portable[:1]
        return ";".join(a + "+PTX" if a in with_ptx else a for a in self.architectures)

    @property
    def flags(self) -> list[str]:
        """The kernels ask nowhere for which GPU they are compiled: the oldest portable one's PTX,
        which takes most of the time, is assembled for all, and GPUs not listed can compile it.
        """
        code = {name: [f"sm_{name}"] for name in self.architectures if name not in self.portable}
        if self.portable:
            oldest = self.portable[0]
            code[oldest] = [f"sm_{name}" for name in self.portable] + [f"compute_{oldest}"]
        return [f"-gencode=arch=compute_{a},code=[{','.join(c)}]" for a, c in code.items()]


def find_cuda() -> Cuda | None:
    """nvcc and what to compile for, or None where there is none or TIR_CUDA_ARCHS is "none"."""
    wanted = os.environ.get("TIR_CUDA_ARCHS", "").strip()
    if wanted == "none":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        if wanted or home:
            place = f"CUDA_HOME={home}" if home else "PATH"
            raise CompileError(f"no nvcc in {place}; TIR_CUDA_ARCHS=none installs without CUDA")
        print(NO_NVCC, file=sys.stderr)
        return None
    listing = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(listing, capture_output=True, text=True, check=False).stdout.split()
    supported = {int(name.removeprefix("compute_")) for name in known if name[8:].isdigit()}
    if wanted:
        names = wanted.replace(",", ";").split(";")
        chosen = in_order({architecture_name(name) for name in names if name.strip()})
        numbers = {name: int(name.rstrip("a")) for name in chosen}
        if unknown := [a for a, n in numbers.items() if n not in supported or n < 80]:
            raise CompileError(
                f"TIR_CUDA_ARCHS={wanted}: {nvcc} cannot compile these kernels for "
                f"{', '.join(unknown)}; it knows {sorted(a for a in supported if a >= 80)}"
            )
    else:
        present = gpus_present() or set(CUDA_ARCHITECTURES)
        chosen = in_order({str(a) for a in present if a in supported})
    if not chosen:
        print(
            f"  tir_kernels: {nvcc} compiles for no GPU of capability 8.0 or newer: no CUDA kernels"
        )
        return None
    return Cuda(nvcc, chosen)


def architecture_name(name: str) -> str:
    """ "90" for "90", "9.0" or "sm_90"; "90a" for "90a" and its like."""
    digits = name.strip().removeprefix("sm_").replace(".", "", 1)
    if not digits.removesuffix("a").isdigit():
        raise CompileError(f"TIR_CUDA_ARCHS holds {name!r}; write it like 80;90, 90a or none")
    return digits


def in_order(names: set[str]) -> list[str]:
    """Oldest first; of one number the portable first."""
    return sorted(names, key=lambda name: (int(name.rstrip("a")), name))


def gpus_present() -> set[int]:
    """Architectures of this machine's GPUs that the kernels serve."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
        found = {int(line.replace(".", "")) for line in lines}
    except (OSError, subprocess.CalledProcessError, ValueError):
        return set()
    return {architecture for architecture in found if architecture >= 80}


def find_compiler() -> list[str] | None:
    """The compiler's command, or None. A CXX that does not exist is an error of its own."""
    if wanted := os.environ.get("CXX", "").split():
        if shutil.which(wanted[0]) is None:
            raise CompileError(f"CXX names a compiler that does not exist: {wanted[0]}")
        return wanted
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    return None


def accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def steps_for(compiler: list[str], pybind11_headers: Path, cuda: Cuda | None) -> list[Step]:
    variants: dict[str, list[str]] = {"portable": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants |= {arch: f for arch, f in X86_FLAGS.items() if accepts(compiler, f)}
    include = ["-Icsrc/include"]
    steps = [
        Step(source, f"{arch}-{source.stem}.o", [*include, f"-DTIR_ARCH={arch}", *flags])
        for arch, flags in variants.items()
        for source in KERNELS
    ]
    built = [f"-DTIR_BUILT_{arch.upper()}" for arch in variants]
    steps += [Step(source, f"{source.stem}.o", [*include, *built]) for source in COMMON]
    system = ["-isystem", str(pybind11_headers), "-isystem", sysconfig.get_path("include")]
    include.append("-Icsrc")
    if cuda is not None:
        steps += [
            Step(source, f"cuda-{source.stem}-{element}.o", [*include, f"-DTIR_ELEMENT={element}"])
            for source in CUDA_KERNELS
            for element in CUDA_ELEMENTS
        ]
        steps += [Step(source, f"cuda-{source.stem}.o", include) for source in CUDA_COMMON]
        steps += [
            Step(source, f"cuda-{source.stem}.o", [*include, *system]) for source in CUDA_HOST
        ]
        system.append(f'-DTIR_BUILT_CUDA="{cuda.label}"')
    steps.append(Step(BINDINGS, f"{BINDINGS.stem}.o", [*include, *system]))
    # What takes longest goes first, so that nothing long is left to one core at the end.
    return sorted(steps, key=lambda s: (s.source.suffix != ".cu", s.source.stem != "bindings"))


def keep_pybind11(folder: Path) -> Path:
    """Copy pybind11's headers to a place of their own.

    pip builds in an environment with a new path every time, and a changed path rebuilds.
    """
    import pybind11  # a build requirement, absent where setup.py only reads metadata

    kept = folder / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        unfinished = kept.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), unfinished)
        unfinished.rename(kept)
    return kept


def version_of(command: list[str]) -> str:
    run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return run.stdout


def build_folder(compiler: list[str], cuda: Cuda | None) -> Path:
    """A folder per Python, compilers and machine: what one of them built is useless to another."""
    identity = [
        *compiler,
        version_of(compiler),
        cuda and (cuda.label, cuda.nvcc, version_of([cuda.nvcc])),
        sysconfig.get_path("include"),
        os.environ.get("CXXFLAGS"),
    ]
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    tag = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    return Path("build") / f"native-{tag}-{key}"


@contextmanager
def only_build_in(folder: Path) -> Iterator[None]:
    """Wait for another installation from the same tree: ninja's files stand one writer only."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_ninja_file(
    folder: Path, compiler: list[str], cuda: Cuda | None, steps: list[Step], module: Path
) -> None:
    def words(*values: object) -> str:
        return " ".join(shlex.quote(str(value)).replace("$", "$$") for value in values)

    def path(value: Path | str) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [
        "-shared"
    ]  # fmt: skip
    extra = os.environ.get("CXXFLAGS", "").split()
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(folder)}",
        "rule compile",
        f"  command = {words(*compiler, *FLAGS, *extra)} $flags -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = compile $out",
        "rule link",
        f"  command = {words(*compiler, *shared, '-pthread')} $in -o $out",
        "  description = link $out",
    ]
    if cuda is not None:
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += ["-ccbin", compiler[0], *cuda.flags]
        lines += [
            "rule compile_cuda",
            # What the assembler reports of registers and spills stays beside the object.
            f"  command = {words(cuda.nvcc, *flags)} $flags -MMD -MF $out.d -c $in -o $out "
            "> $out.log 2>&1 || (cat $out.log; false)",
            "  deps = gcc",
            "  depfile = $out.d",
            "  description = compile $out",
            # nvcc knows where its static runtime lies and what that needs.
            "rule link_cuda",
            f"  command = {words(cuda.nvcc, '-ccbin', compiler[0], '-shared', '-cudart=static')} "
            "-Xcompiler=-pthread $in -o $out",
            "  description = link $out",
        ]
    objects = []
    for step in steps:
        target = folder / step.object_name
        objects.append(path(target))
        rule = "compile_cuda" if step.source.suffix == ".cu" else "compile"
        lines.append(f"build {path(target)}: {rule} {path(step.source)}")
        lines.append(f"  flags = {words(*step.flags)}")
    link = "link" if cuda is None else "link_cuda"
    lines += [f"build {path(module)}: {link} {' '.join(objects)}", f"default {path(module)}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


def ninja_command() -> str:
    try:
        import ninja  # a build requirement
    except ImportError:
        return "ninja"
    return str(Path(ninja.BIN_DIR) / "ninja")


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        if compiler is None:
            print(NO_COMPILER, file=sys.stderr)
            ext.optional = True  # nothing to copy into the package
            return
        cuda = find_cuda()
        folder = build_folder(compiler, cuda)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        module = folder / "_C.so"
        os.chdir(ROOT)
        with only_build_in(folder):
            steps = steps_for(compiler, keep_pybind11(folder), cuda)
            write_ninja_file(folder, compiler, cuda, steps, module)
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            command = [ninja_command(), "-f", str(folder / "build.ninja"), *jobs]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            hint = "" if cuda is None else "(TIR_CUDA_ARCHS=none installs without CUDA kernels)\n"
            raise CompileError(f"a compiler failed:\n{result.stdout}{result.stderr}{hint}")
        print(result.stdout)
        target = Path(self.get_ext_fullpath(ext.name))
        if not target.exists() or not filecmp.cmp(module, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            # A process may have the old module open: replace the file, do not write into it.
            unfinished = target.with_suffix(".part")
            shutil.copyfile(module, unfinished)
            unfinished.replace(target)


setup(
    ext_modules=[
        Extension(
            "tir_kernels._C",
            sources=[str(source) for source in (*KERNELS, *COMMON, *CUDA_HOST, BINDINGS)],
            depends=[str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("csrc/**/*.*"))],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
