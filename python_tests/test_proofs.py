"""Proofs are done once, and again when anything that they depend on has changed."""

from __future__ import annotations

from pathlib import Path

import proofs
import pytest


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(proofs, "ROOT", tmp_path)
    monkeypatch.setattr(proofs, "FOLDER", tmp_path / "build" / "proofs")
    monkeypatch.delenv("TIR_PROVE", raising=False)
    path = tmp_path / "kernel.cu"
    path.write_text("one")
    return path


def is_run(file: Path, *facts: object, name: str = "proof") -> bool:
    try:
        with proofs.once(proofs.place(name, [file], *facts)):
            return True
    except pytest.skip.Exception:
        return False


def test_a_proof_is_done_once_for_each_content(file: Path) -> None:
    assert is_run(file)
    assert not is_run(file)
    file.write_text("two")
    assert is_run(file)
    file.write_text("one")
    assert not is_run(file)


def test_name_and_facts_count(file: Path) -> None:
    assert is_run(file, "-O1")
    assert is_run(file, "-O2")
    assert is_run(file, "-O2", name="other")
    assert not is_run(file, "-O2")


def test_a_proof_that_fails_is_not_kept(file: Path) -> None:
    with pytest.raises(AssertionError), proofs.once(proofs.place("proof", [file])):
        raise AssertionError
    assert is_run(file)


def test_the_environment_asks_for_all_proofs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_run(file)
    monkeypatch.setenv("TIR_PROVE", "again")
    assert is_run(file)


def test_sources_are_found_in_folders_and_by_name() -> None:
    found = {str(p.relative_to(proofs.ROOT)) for p in proofs.sources("csrc/cuda", "setup.py")}
    assert {"setup.py", "csrc/cuda/tile.cuh", "csrc/cuda/launchers.cpp"} <= found
    assert not any(name.startswith("tir_kernels") for name in found)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        proofs.sources("nowhere")


def test_kernels_of_the_cpu_are_no_part_of_cuda() -> None:
    found = {str(p.relative_to(proofs.ROOT)) for p in proofs.cuda_sources()}
    assert {"csrc/include/tir/rules.h", "csrc/emulation/gpu.cpp", "csrc/cuda/tile.cuh"} <= found
    assert not any(name.startswith("csrc/cpu/") for name in found)
