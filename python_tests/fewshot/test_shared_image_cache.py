"""Processes that use one cache of images at once.

Run as a program it is one of these processes.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cached_images import Counting, Setting
from small_images import write_images


def main(root, folder, seconds):
    """What a process of the tests below does."""

    def tell(text, done, total):
        if done == 0:
            print(text, flush=True)

    # A shell's background jobs, tests among them, start with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    setting = Setting(Path(root), Path(folder))
    reader = setting.reader(Counting(seconds=float(seconds)), tell)
    total = int(reader.all().long().sum())
    print(reader.preprocess.decoded, total, len(setting.notices))


@pytest.fixture
def processes(tmp_path):
    """Starts processes that read all images of a class through one cache."""
    setting = Setting(write_images(tmp_path / "images", {"a": 40}), tmp_path / "cache")
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), str(here)])
    started = []

    def start(seconds=0.05):
        process = subprocess.Popen(
            [sys.executable, __file__, str(setting.root), str(setting.folder), str(seconds)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        return process

    yield setting, start
    for process in started:
        process.kill()
        process.communicate()


WAITING = "decoding a in another process"


def outcome(process):
    last = process.communicate(timeout=120)[0].splitlines()[-1]
    decoded, total, notices = map(int, last.split())
    assert process.returncode == 0
    assert notices == 0
    return decoded, total


def test_two_processes_at_once_decode_once(processes):
    setting, start = processes
    both = [start(), start()]
    outcomes = [outcome(process) for process in both]
    expected = int(setting.without_cache().all().long().sum())
    assert sorted(outcomes) == [(0, expected), (40, expected)]
    assert [path.suffix for path in setting.files] == [".images"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_is_replaced_by_one_that_waits(processes, number):
    setting, start = processes
    builder = start(seconds=1)
    deadline = time.monotonic() + 120
    while not list(setting.folder.glob("*.partial")):
        assert builder.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    waiting = start(seconds=0)
    assert waiting.stdout.readline().strip() == WAITING
    builder.send_signal(number)
    plain = setting.without_cache().all()
    assert outcome(waiting) == (40, int(plain.long().sum()))
    assert [path.suffix for path in setting.files] == [".images"]
    last = setting.reader()
    assert torch.equal(last.all(), plain)
    assert last.preprocess.decoded == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
