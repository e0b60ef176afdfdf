"""Runs that are killed or interrupted, and the program as it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import pytest
from command_line import results, with_value
from programs import output_of


def start(arguments, tmp_path, count):
    """Start a slow run in a process of its own and wait until it has some results."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), str(here)])
    process = subprocess.Popen(
        [sys.executable, str(here / "fake_engine.py"), *arguments],
        env=os.environ | {"FAKE_STEP_SECONDS": "0.1", "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "out" / "episodes.jsonl"
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def assert_continues(arguments, tmp_path):
    """What was kept is a beginning of the whole run, and continuing it gives the rest."""
    reference = with_value(arguments, "--out", str(tmp_path / "reference"))
    assert fake_engine.run_main(reference) == 0
    kept, whole = results(tmp_path / "out"), results(tmp_path / "reference")
    assert 2 <= len(kept) < len(whole)
    assert kept == whole[: len(kept)]
    assert fake_engine.run_main(arguments) == 0
    assert results(tmp_path / "out") == whole
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("out", "reference")
    ]
    for summary in summaries:
        for entry in summary["arms"]:
            del entry["seconds_per_step"]
    assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_killed_process_loses_nothing(arguments, tmp_path):
    process = start(arguments, tmp_path, count=2)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert_continues(arguments, tmp_path)


@pytest.fixture
def heeds_interrupts():
    """A shell's background jobs, tests among them, start with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(arguments, tmp_path, number, capsys, monkeypatch):
    finetune, calls = fake_engine.fake_finetune, []

    def interrupted(*positional, **options):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return finetune(*positional, **options)

    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(fake_engine, "fake_finetune", interrupted)
        assert fake_engine.run_main(arguments) == 130
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    messages = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(messages) == 4
    assert "what is finished is kept. To continue: tir-finetune run --data " in messages[-1]
    assert len(results(tmp_path / "out")) == 3
    assert_continues(arguments, tmp_path)


def test_module_runs_as_a_program():
    bad = ["run", "--data", "d", "--model", "m", "--out", "o", "--ways", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tir_kernels.fewshot", *bad],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("tir-finetune: error: --ways must be at least 2; got 1\n")


def test_command_itself_imports_nothing_slow():
    # With the packages' own imports left out, only those of the command and the config are seen.
    program = """
import sys, types
for name in ("tir_kernels", "tir_kernels.fewshot"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
import tir_kernels.fewshot.command
print(sorted({"open_clip", "torchvision", "scipy", "rich"} & set(sys.modules)))
"""
    root = Path(__file__).parents[2]
    assert output_of(program, cwd=root) == "[]"
