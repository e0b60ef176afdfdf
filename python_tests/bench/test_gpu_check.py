"""The stages of gpu_check.sh, with stand-ins for the programs it calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.sh"

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
argument() { while [[ $1 != "$name" ]]; do shift; done; echo "$2"; }
case "$*" in
    *is_available*) exit "${NO_GPU:-0}" ;;
    *get_device_name*) echo "NVIDIA H200" ;;
    *get_device_capability*) echo 90 ;;
    *"-m pytest"*"-m gpu"*) exit "${GPU_TESTS:-0}" ;;
    *"-m bench.report"*) name=--output; echo "# Results" > "$(argument "$@")" ;;
    *"-m bench "*) name=--json; echo "[]" > "$(argument "$@")"; exit "${BENCH:-0}" ;;
esac
"""
STAGES = [
    "environment",
    "build",
    "gpu-tests",
    "operator-tests",
    "sanitizer",
    "benchmarks",
    "whole-runs",
]


@pytest.fixture
def check(tmp_path: Path):
    """Runs a copy of the script; further variables steer the stand-ins."""
    (tmp_path / "repo" / "bench").mkdir(parents=True)
    script = tmp_path / "repo" / "bench" / "gpu_check.sh"
    shutil.copy(SCRIPT, script)
    programs = tmp_path / "programs"
    programs.mkdir()
    stand_ins = {"python": FAKE_PYTHON, "nvidia-smi": "#!/bin/sh\n", "nvcc": "#!/bin/sh\n"}
    stand_ins["compute-sanitizer"] = '#!/bin/sh\nexit "${SANITIZER:-0}"\n'
    for name, text in stand_ins.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(*arguments: str, **variables: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python"),
            "CALLS": str(calls),
        }
        result = subprocess.run(
            ["bash", str(script), *arguments],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.returncode, result.stdout + result.stderr, calls.read_text().splitlines()

    run.repository = tmp_path / "repo"
    return run


def test_refuses_where_there_is_no_gpu(check):
    status, output, calls = check(NO_GPU="1")
    assert status == 2
    assert "sees no CUDA GPU" in output
    assert len(calls) == 1
    assert not (check.repository / "bench" / "results").exists()


@pytest.mark.parametrize("arguments", [["--frehs"], ["--budget"], ["--budget", "soon"]])
def test_bad_options_are_refused(check, arguments):
    status, output, calls = check(*arguments)
    assert status == 2
    assert arguments[0] in output
    assert calls == []


def test_runs_every_stage_and_writes_results(check):
    status, output, calls = check()
    assert status == 0, output
    assert f"passed: {' '.join(STAGES)} results" in output
    results = check.repository / "bench" / "results"
    assert {path.suffix for path in results.glob("nvidia-h200-*")} == {".json", ".md"}
    assert any(call.startswith("setup.py build_ext --inplace") for call in calls)
    assert "TIR_CUDA_ARCHS=90" in (results / "work" / "build.log").read_text()


def test_a_failing_stage_stops_no_other_and_is_run_again(check):
    status, output, _ = check(GPU_TESTS="1")
    assert status == 1
    assert "failed: gpu-tests" in output
    assert list((check.repository / "bench" / "results").glob("nvidia-h200-*.md"))

    status, output, calls = check()
    assert status == 0
    assert "== build: finished before" in output
    assert not any("setup.py" in call for call in calls)
    assert any("-m gpu" in call for call in calls)


def test_benchmarks_go_on_in_the_next_call(check):
    status, output, _ = check("--budget", "7", BENCH="75")
    assert status == 0
    assert "unfinished: benchmarks whole-runs" in output
    status, output, calls = check()
    assert status == 0
    assert "unfinished: none" in output
    assert any(call.startswith("-m bench attention") and "--budget" in call for call in calls)
    assert any(call.startswith("-m bench episodes --device cuda") for call in calls)


def test_sanitizer_findings_fail_its_stage(check, tmp_path):
    status, output, _ = check(str(tmp_path / "folder"), SANITIZER="1")
    assert status == 1
    assert "failed: sanitizer" in output
    assert (tmp_path / "folder" / "sanitizer-racecheck.log").exists()


def test_fresh_starts_again_and_deletes_nothing_else(check, tmp_path):
    folder = tmp_path / "folder"
    check(str(folder))
    (folder / "notes.txt").write_text("mine")
    _, output, calls = check("--fresh", str(folder))
    assert "finished before" not in output
    assert any("setup.py" in call for call in calls)
    assert (folder / "notes.txt").exists()


def test_changed_sources_start_again(check):
    check()
    (check.repository / "bench" / "timing.py").write_text("changed = True")
    _, output, _ = check()
    assert "the sources have changed" in output
    assert "finished before" not in output
