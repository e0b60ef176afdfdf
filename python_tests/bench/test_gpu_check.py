"""The stages of gpu_check.sh, with stand-ins for the programs it calls."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from bench import records

pytestmark = pytest.mark.slow  # each starts a shell and programs

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.sh"

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
argument() { while [[ $1 != "$name" ]]; do shift; done; echo "$2"; }
case "$*" in
    *is_available*) [[ -n ${NO_GPU:-} ]] || echo "${GPU:-NVIDIA H200}" ;;
    *get_device_capability*) echo 90 ;;
    *"import xdist"*) exit "${NO_XDIST:-0}" ;;
    *"import open_clip"*) exit "${NO_OPEN_CLIP:-0}" ;;
    *available_backends*) exit "${NO_BACKEND:-0}" ;;
    *"pip install"*) name=--target; touch "$(argument "$@")/installed"; exit "${PIP:-0}" ;;
    *"setup.py build_ext"*) echo built > tir_kernels/_C.fake.so ;;
    *"-m pytest"*"-m gpu"*)
        mkdir -p "$TRITON_CACHE_DIR"
        echo compiled > "$TRITON_CACHE_DIR/kernel"
        [[ -z ${NEEDS_WHEELS:-} || -e $PYTHONPATH/installed ]] || exit 3
        [[ -z ${HANGS:-} ]] || exec sleep 60
        exit "${GPU_TESTS:-0}"
        ;;
    *"-m bench.report"*) name=--output; echo "# Results" > "$(argument "$@")" ;;
    *"-m bench "*) name=--json; echo "[]" > "$(argument "$@")"; exit "${BENCH:-0}" ;;
esac
"""
FAKE_SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >> "$CALLS"
[[ $2 != "${DIRTY:-none}" ]]
"""
STAGES = [
    "environment",
    "build",
    "backends",
    "gpu-tests",
    "operator-tests",
    "sanitizer",
    "benchmarks",
    "whole-runs",
    "compiled-peers",
]


class Check:
    """Runs a copy of the script on a made-up machine; variables steer its stand-in programs."""

    def __init__(self, place: Path) -> None:
        self.place, self.calls = place, place / "calls"
        self.repository = place / "repo"
        for name in ("bench", "tir_kernels"):
            (self.repository / name).mkdir(parents=True)
        self.script = self.repository / "bench" / "gpu_check.sh"
        shutil.copy(SCRIPT, self.script)
        programs = place / "programs"
        programs.mkdir()
        stand_ins = {"python": FAKE_PYTHON, "nvidia-smi": "#!/bin/sh\n", "nvcc": "#!/bin/sh\n"}
        stand_ins["compute-sanitizer"] = FAKE_SANITIZER
        for name, text in stand_ins.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        own = ("PYTHONPATH", "TIR_CUDA_ARCHS")
        self.environment = {n: v for n, v in os.environ.items() if n not in own} | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": str(programs / "python"),
            "CALLS": str(self.calls),
        }

    def __call__(self, *arguments: object, **variables: str) -> tuple[int, str, list[str]]:
        self.calls.write_text("")
        result = subprocess.run(
            ["bash", str(self.script), *map(str, arguments)],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        calls = self.calls.read_text().splitlines()
        return result.returncode, result.stdout + result.stderr, calls

    @property
    def results(self) -> set[str]:
        return {path.name for path in (self.repository / "bench" / "results").glob("nvidia-*")}


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path / "machine")


def test_refuses_where_there_is_no_gpu(check):
    status, output, calls = check(NO_GPU="1")
    assert status == 2
    assert "sees no CUDA GPU" in output
    assert not any(call.startswith("-m") for call in calls)
    assert not (check.repository / "bench" / "results").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--frehs"],
        ["--budget"],
        ["--budget", "soon"],
        ["--most-mib", "-1"],
        ["--from"],
        ["--to", ""],
    ],
)
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
    assert {Path(name).suffix for name in check.results} == {".json", ".md"}
    assert any(call.startswith("setup.py build_ext --inplace") for call in calls)
    assert "TIR_CUDA_ARCHS=90" in (results / "work" / "build.log").read_text()
    tests = [call for call in calls if "-m pytest" in call]
    assert len(tests) == 2
    assert all("-n 8" in call and "--ignore" not in call for call in tests)
    assert "-k (cuda or triton) and not emulated" in tests[1]
    watched = [call for call in calls if call.startswith("sanitizer")]
    assert len(watched) == 4
    assert all(call.endswith("-m bench.sanitizer_cases cuda") for call in watched)
    measured = [call for call in calls if call.startswith("-m bench ")]
    assert [("--no-compile" in call, "episodes" in call) for call in measured] == [
        (True, False),
        (False, True),
        (False, False),
    ]


def test_a_failing_stage_stops_no_other_and_is_run_again(check):
    status, output, _ = check(GPU_TESTS="1")
    assert status == 1
    assert "failed: gpu-tests" in output
    assert check.results

    status, output, calls = check()
    assert status == 0
    assert "== build: finished before" in output
    assert not any("setup.py" in call for call in calls)
    assert any("-m gpu" in call for call in calls)


def test_benchmarks_go_on_in_the_next_call(check):
    status, output, _ = check("--budget", "7", BENCH="75")
    assert status == 75
    assert "unfinished: benchmarks whole-runs compiled-peers" in output
    status, output, calls = check()
    assert status == 0
    assert "unfinished: none" in output
    assert any(call.startswith("-m bench attention") and "--budget" in call for call in calls)
    assert any(call.startswith("-m bench episodes --device cuda") for call in calls)


def test_a_call_without_time_for_benchmarks_is_unfinished(check):
    text = check.script.read_text()
    check.script.write_text(text.replace("time_limit=525", "time_limit=60"))
    status, output, _ = check()
    assert status == 75
    assert "== benchmarks: no time left" in output
    assert "unfinished: benchmarks whole-runs compiled-peers results" in output
    assert "failed: none" in output
    assert not check.results


@pytest.mark.parametrize(("time_limit", "status"), [(60, 75), (525, 1)])
def test_a_stage_that_the_end_of_the_call_cut_goes_on(check, time_limit, status):
    text = check.script.read_text()
    check.script.write_text(text.replace("time_limit=525", f"time_limit={time_limit}"))
    stand_in = check.place / "programs" / "timeout"
    stand_in.write_text('#!/bin/bash\n[[ $* == *gpu_tests* ]] && exit 124\nshift 2; exec "$@"\n')
    stand_in.chmod(0o755)
    found, output, _ = check()
    assert found == status
    group = output.split("unfinished: " if status == 75 else "failed: ")[1].split("\n")[0]
    assert "gpu-tests" in group


def test_tools_of_the_sanitizer_that_were_clean_do_not_run_again(check, tmp_path):
    status, output, _ = check(tmp_path / "folder", DIRTY="racecheck")
    assert status == 1
    assert "racecheck: FAILED" in output
    assert "failed: sanitizer" in output
    assert (tmp_path / "folder" / "sanitizer-racecheck.log").exists()
    status, _, calls = check(tmp_path / "folder")
    assert status == 0
    watched = [call.split()[2] for call in calls if call.startswith("sanitizer")]
    assert watched == ["racecheck"]


def test_a_backend_that_does_not_run_fails(check):
    status, output, _ = check(NO_BACKEND="1")
    assert status == 1
    assert "failed: backends" in output


def test_what_the_machine_lacks_is_done_without(check):
    status, output, calls = check(NO_XDIST="1", NO_OPEN_CLIP="1")
    assert status == 0
    assert (
        "open_clip is missing: tests of towers, adapters, fewshot and demo are left out" in output
    )
    tests = [call for call in calls if "-m pytest" in call]
    assert not any("-n 8" in call for call in tests)
    assert "--ignore=python_tests/fewshot" in tests[0]


def test_wheels_are_installed_first(check):
    (check.repository / "wheels").mkdir()
    (check.repository / "wheels" / "some-1.0-py3-none-any.whl").touch()
    status, output, calls = check(NEEDS_WHEELS="1")
    assert status == 0, output
    (call,) = [call for call in calls if "pip install" in call]
    assert "--no-index --no-deps" in call
    assert "wheels/some-1.0-py3-none-any.whl" in call
    assert calls.index(call) < 3
    assert not Path(call.split("--target ")[1].split()[0]).exists()
    status, output, _ = check(PIP="1")
    assert status == 1
    assert "failed: wheels" in output


def test_fresh_starts_again_and_deletes_nothing_else(check, tmp_path):
    folder = tmp_path / "folder"
    check(folder)
    (folder / "notes.txt").write_text("mine")
    _, output, calls = check("--fresh", folder)
    assert "finished before" not in output
    assert any("setup.py" in call for call in calls)
    assert (folder / "notes.txt").exists()


def test_changed_sources_and_another_gpu_start_again(check):
    check()
    (check.repository / "bench" / "timing.py").write_text("changed = True")
    _, output, _ = check()
    assert "the sources or the GPU have changed" in output
    assert "finished before" not in output
    _, output, _ = check(GPU="NVIDIA H100")
    assert "the sources or the GPU have changed" in output
    assert {name.split("-")[1] for name in check.results} == {"h200", "h100"}


def test_a_second_run_of_a_day_keeps_the_first(check):
    check()
    first = check.results
    check()  # goes on with the same run
    assert check.results == first
    check("--fresh")
    assert len(check.results) == 4
    assert {name.split(".")[0][-2:] for name in check.results - first} == {"-2"}


def test_another_machine_goes_on_from_the_archive(check, tmp_path):
    archive = tmp_path / "so far.tar.gz"
    status, output, _ = check("--to", archive, BENCH="75")
    assert status == 75
    assert f"packed into {archive}" in output
    name = {path for path in check.results if path.endswith(".md")}

    other = Check(tmp_path / "other machine")
    status, output, calls = other("--from", archive, tmp_path / "work")
    assert status == 0, output
    for stage in ("build", "gpu-tests", "operator-tests", "sanitizer"):
        assert f"== {stage}: finished before" in output
    assert not any("setup.py" in call or call.startswith("sanitizer") for call in calls)
    assert any("available_backends" in call for call in calls)  # asked of each machine
    assert (other.repository / "tir_kernels" / "_C.fake.so").read_text() == "built\n"
    assert (tmp_path / "work" / "cache" / "triton" / "kernel").read_text() == "compiled\n"
    assert name < other.results
    assert (tmp_path / "work.tar.gz").exists()

    _, output, _ = other("--from", archive, tmp_path / "work")
    assert "has work of its own" in output


def test_an_archive_that_is_too_large_leaves_the_caches_behind(check, tmp_path):
    archive = tmp_path / "so-far.tar.gz"
    for limit, has_cache in ((100, True), (0, False)):
        _, output, _ = check("--to", archive, "--most-mib", limit)
        assert ("without the caches" in output) != has_cache
        with tarfile.open(archive) as packed:
            names = packed.getnames()
        assert ("./cache/triton/kernel" in names) == has_cache
        assert {"./records.json", "./gpu-tests.done", "./state"} <= set(names)


def test_what_is_no_archive_is_refused(check, tmp_path):
    (tmp_path / "broken.tar.gz").write_text("nothing packed")
    for name in ("broken.tar.gz", "missing.tar.gz"):
        status, output, _ = check("--from", tmp_path / name)
        assert status == 2
        assert f"{name} cannot be unpacked" in output


def test_an_interrupted_call_is_packed_too(check, tmp_path):
    archive = tmp_path / "so-far.tar.gz"
    check.calls.write_text("")
    process = subprocess.Popen(
        ["bash", str(check.script), "--to", str(archive)],
        env=check.environment | {"HANGS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while "-m gpu" not in check.calls.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    with tarfile.open(archive) as packed:
        assert "./build.done" in packed.getnames()
        assert "./gpu-tests.done" not in packed.getnames()


def test_the_commit_is_told_where_git_did_not_come_along(tmp_path, monkeypatch):
    monkeypatch.delenv("TIR_COMMIT", raising=False)
    assert records._commit(tmp_path) == "unknown"
    (tmp_path / "COMMIT").write_text("abc1234+\n")
    assert records._commit(tmp_path) == "abc1234+"
    monkeypatch.setenv("TIR_COMMIT", "def5678")
    assert records._commit(tmp_path) == "def5678"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert records._commit(tmp_path) not in ("unknown", "def5678")
    (tmp_path / "copy").mkdir()  # inside somebody else's repository
    assert records._commit(tmp_path / "copy") == "def5678"
