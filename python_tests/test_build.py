"""The build of the compiled module: what is compiled again, and what is said when it cannot be."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("pybind11", reason="builds need pybind11, one of the test requirements")
pytest.importorskip("setuptools", reason="builds need setuptools")

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)

# Preprocesses instead of compiling: dependencies are found as ever, in a fraction of the time.
QUICK_COMPILER = """#!/bin/sh
case "$*" in
  *-shared*) for last; do :; done; echo linked > "$last"; echo link >> "$TIR_TEST_LOG" ;;
  *-MMD*) echo "$*" >> "$TIR_TEST_LOG"; exec c++ "$@" -E -w ;;
  *) exec c++ "$@" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    copy = tmp_path / "a folder with spaces"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name in ("README.md", "LICENSE"):
        (copy / name).write_text("for the build to find\n")
    (copy / "tir_kernels").mkdir()
    (copy / "tir_kernels" / "__init__.py").touch()
    return copy


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("CXX", "CXXFLAGS", "CUDA_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=project,
        env={**kept, "TIR_CUDA_ARCHS": "none", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def built_modules(project: Path) -> list[Path]:
    return list((project / "tir_kernels").glob("_C.*"))


@needs_compiler
def test_only_what_changed_is_compiled_again(project: Path, tmp_path: Path) -> None:
    compiler, log = tmp_path / "quick-c++", tmp_path / "log"
    compiler.write_text(QUICK_COMPILER)
    compiler.chmod(0o755)

    def compiled_sources() -> list[str]:
        log.write_text("")
        run = build(project, CXX=str(compiler), TIR_TEST_LOG=str(log))
        assert run.returncode == 0, run.stdout + run.stderr
        lines = log.read_text().splitlines()
        return [line.split(" -c ")[1].split(" -o ")[0] for line in lines if " -c " in line]

    first = compiled_sources()
    sources = {*project.glob("csrc/cpu/**/*.cpp"), *project.glob("csrc/*.cpp")}
    assert {str(path.relative_to(project)) for path in sources} == set(first)
    assert len(built_modules(project)) == 1
    assert compiled_sources() == []

    def touch(name: str) -> None:
        time.sleep(0.01)
        (project / name).touch()

    touch("csrc/cpu/selection.cpp")
    assert compiled_sources() == ["csrc/cpu/selection.cpp"]
    touch("csrc/cpu/kernels/relevance.cpp")
    again = compiled_sources()
    assert set(again) == {"csrc/cpu/kernels/relevance.cpp"}
    assert len(again) == first.count("csrc/cpu/kernels/relevance.cpp")
    touch("csrc/include/tir/rules.h")
    attention = (f"attention_{name}" for name in ("forward", "backward", "statistics"))
    kernels = ("activation", "relevance", *attention)
    users = {"csrc/cpu/selection.cpp", *(f"csrc/cpu/kernels/{name}.cpp" for name in kernels)}
    assert set(compiled_sources()) == users
    # Another set of flags has a folder of its own; coming back costs nothing.
    assert build(project, CXX=str(compiler), TIR_TEST_LOG=str(log), CXXFLAGS="-g").returncode == 0
    assert compiled_sources() == []


@needs_compiler
def test_only_the_bindings_see_pybind11() -> None:
    including = {p.name for p in (ROOT / "csrc").glob("**/*.*") if "pybind11/" in p.read_text()}
    assert including == {"bindings.cpp"}


def test_without_a_compiler_the_package_installs_and_says_so(project: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    run = build(project, PATH=str(empty))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "no C++ compiler was found" in run.stderr
    assert "apt install g++" in run.stderr
    assert built_modules(project) == []


def test_a_compiler_that_does_not_exist_is_an_error(project: Path) -> None:
    run = build(project, CXX="/nowhere/c++")
    assert run.returncode != 0
    assert "CXX names a compiler that does not exist: /nowhere/c++" in run.stderr


# Knows architectures up to 9.0; compiles to nothing, and links by writing down what it was told.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
  --version) echo 'release 99.0' ;;
  *) echo "$*" >> "$TIR_TEST_LOG"
     while [ $# -gt 0 ]; do
       case "$1" in -o) echo > "$2" ;; -MF) : > "$2" ;; esac
       shift
     done ;;
esac
"""


@pytest.fixture
def with_nvcc(project: Path, tmp_path: Path):
    """Builds with a C++ compiler and an nvcc that only pretend; gives the run and nvcc's lines."""
    toolkit, log = tmp_path / "toolkit", tmp_path / "nvcc log"
    (toolkit / "bin").mkdir(parents=True)
    for path, text in (
        (toolkit / "bin" / "nvcc", FAKE_NVCC),
        (tmp_path / "quick-c++", QUICK_COMPILER),
        (toolkit / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n"),
    ):
        path.write_text(text)
        path.chmod(0o755)

    def run(**environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log.write_text("")
        default = {
            "PATH": f"{toolkit / 'bin'}:{os.environ['PATH']}",
            "CXX": str(tmp_path / "quick-c++"),
            "TIR_TEST_LOG": str(log),
            "TIR_CUDA_ARCHS": "",
        }
        done = build(project, **(default | environment))
        return done, [line for line in log.read_text().splitlines() if "-o" in line]

    return run


def codes(command: str) -> list[str]:
    """What nvcc was told to compile for, in alphabetical order."""
    told = [word for word in shlex.split(command) if word.startswith("-gencode=")]
    return sorted(word.removeprefix("-gencode=") for word in told)


def test_no_kernel_asks_for_which_gpu_it_is_compiled() -> None:
    """One that did would be compiled for the oldest alone, and run so everywhere."""
    for path in [*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/include/tir/*")]:
        assert "__CUDA_ARCH__" not in path.read_text(), path.name


@needs_compiler
def test_nvcc_builds_the_kernels_for_the_architectures_it_knows(with_nvcc) -> None:
    done, commands = with_nvcc()
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [c for c in commands if ".cu " in c]
    # Four kernels for three types of elements, the selection, and what asks the runtime.
    assert len(compiled) == 14
    for command in compiled:
        assert codes(command) == ["arch=compute_80,code=[sm_80,sm_90,compute_80]"]
    (link,) = [c for c in commands if "-shared" in c]
    assert "-cudart=static" in link


@needs_compiler
def test_architectures_can_be_chosen(with_nvcc) -> None:
    for spelling in ("90", "9.0", "sm_90", "90;"):
        done, commands = with_nvcc(TIR_CUDA_ARCHS=spelling)
        assert done.returncode == 0, done.stdout + done.stderr
        for command in (c for c in commands if ".cu " in c):
            assert codes(command) == ["arch=compute_90,code=[sm_90,compute_90]"]
    done, commands = with_nvcc(TIR_CUDA_ARCHS="9.0a;80")
    assert done.returncode == 0, done.stdout + done.stderr
    for command in (c for c in commands if ".cu " in c):
        # What other GPUs compile is never of 90a.
        assert codes(command) == [
            "arch=compute_80,code=[sm_80,compute_80]",
            "arch=compute_90a,code=[sm_90a]",
        ]
    done, commands = with_nvcc(TIR_CUDA_ARCHS="none")
    assert done.returncode == 0
    assert not [c for c in commands if ".cu " in c]


@needs_compiler
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TIR_CUDA_ARCHS": "100"}, "cannot compile these kernels for 100; it knows [80, 90]"),
        ({"TIR_CUDA_ARCHS": "75"}, "cannot compile these kernels for 75;"),
        (
            {"TIR_CUDA_ARCHS": "hopper"},
            "TIR_CUDA_ARCHS holds 'hopper'; write it like 80;90, 90a or none",
        ),
        ({"CUDA_HOME": "/nowhere"}, "no nvcc in CUDA_HOME=/nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "=".join(*value.items()),
)
def test_a_wish_that_cannot_be_met_is_an_error(with_nvcc, environment, message) -> None:
    done, _ = with_nvcc(**environment)
    assert done.returncode != 0
    assert message in done.stderr


@needs_compiler
def test_without_nvcc_the_package_installs_and_says_so(project: Path, tmp_path: Path) -> None:
    compiler, tools = tmp_path / "quick-c++", tmp_path / "tools"
    compiler.write_text(QUICK_COMPILER)
    compiler.chmod(0o755)
    tools.mkdir()
    for name in ("sh", "c++", "cc1plus", "as", "ld"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    done = build(
        project,
        PATH=str(tools),
        CXX=str(compiler),
        TIR_TEST_LOG=str(tmp_path / "log"),
        TIR_CUDA_ARCHS="",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nvcc was not found" in done.stderr
    assert len(built_modules(project)) == 1


@needs_compiler
def test_a_compile_error_fails_the_build_with_the_compilers_words(project: Path) -> None:
    broken = project / "csrc/cpu/kernels/attention_forward.cpp"
    broken.write_text("this is no C++;\n")
    run = build(project, CXXFLAGS="-O0")
    assert run.returncode != 0
    assert "attention_forward.cpp:1" in run.stdout + run.stderr
    assert "error:" in run.stdout + run.stderr
    assert built_modules(project) == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="reads symbols with nm")
def test_instruction_sets_share_no_code() -> None:
    """A function that several objects define is kept once by the linker, maybe in the version with
    instructions that the machine lacks."""
    objects = list(ROOT.glob("build/native-*/avx*.o"))
    if not objects:
        pytest.skip("the package was not built in this source tree")
    for path in objects:
        architecture = path.name.split("-")[0]
        run = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        for line in run.stdout.splitlines():
            kind, _, name = line[17:].partition(" ")
            if kind in "WVu" and "DW.ref." not in name:
                assert f"tir::cpu::{architecture}::" in name, f"{path.name} shares {name}"
