"""The build of the compiled module: what is compiled again, and what is said when it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("pybind11", reason="builds need pybind11, one of the test requirements")
pytest.importorskip("setuptools", reason="builds need setuptools")
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
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "CXXFLAGS")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=project,
        env={**kept, **environment},
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
    sources = {str(p.relative_to(project)) for p in project.glob("csrc/**/*.cpp")}
    assert {s for s in sources if "emulation" not in s} == set(first)
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
    assert compiled_sources() == ["csrc/cpu/selection.cpp"]
    # Another set of flags has a folder of its own; coming back costs nothing.
    assert build(project, CXX=str(compiler), TIR_TEST_LOG=str(log), CXXFLAGS="-g").returncode == 0
    assert compiled_sources() == []


@needs_compiler
def test_only_the_bindings_see_pybind11() -> None:
    including = [p.name for p in (ROOT / "csrc").glob("**/*.*") if "pybind11/" in p.read_text()]
    assert including == ["bindings.cpp"]


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
