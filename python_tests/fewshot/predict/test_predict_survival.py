"""Predictions that are killed, and those that several processes share."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tir_kernels.fewshot.command import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture
def many(drawn, tmp_path):
    """A hundred and twenty names of the drawn images."""
    paths = sorted(drawn.rglob("*.png"))
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(120):
        os.link(paths[number % len(paths)], folder / f"{number:03d}, \n.png")
    return folder


def command(classifier, *arguments):
    words = [str(each) for each in (classifier, *arguments, "--device=cpu", "--batch-size=2")]
    return ["-m", "tir_kernels.fewshot", "predict", *words]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_killed_over_and_over(classifier, many, tmp_path):
    assert main(command(classifier, many, "--out", tmp_path / "whole.csv")[2:]) == 0
    out = tmp_path / "p.csv"
    delays = random.Random(0)
    sizes = []
    for _ in range(3):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen(
            [sys.executable, *command(classifier, many, "--out", out)],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not out.exists() or out.stat().st_size <= before:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        sizes.append(out.stat().st_size)
        with open(out, "ab") as file:  # as a kill in the midst of a write leaves it
            file.write(b'"half a ro')
    assert sizes == sorted(set(sizes)), "each goes on where the one before was killed"
    assert main(command(classifier, many, "--out", out)[2:]) == 0
    expected = rows(tmp_path / "whole.csv")
    found = rows(out)
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [float(row[2]) for row in found[1:]] == pytest.approx(
        [float(row[2]) for row in expected[1:]], abs=1e-5
    )


def test_processes_of_torchrun_share_the_images(classifier, many, tmp_path, capsys):
    assert main(command(classifier, many, "--out", tmp_path / "whole.csv")[2:]) == 0
    out = tmp_path / "p.csv"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    shared = [*launch, *command(classifier, many, "--out", out)]
    done = subprocess.run(shared, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    parts = [rows(tmp_path / f"p.{rank}.csv") for rank in range(2)]
    assert all(36 < len(part) - 1 < 84 for part in parts)
    expected = rows(tmp_path / "whole.csv")
    found = sorted(parts[0][1:] + parts[1][1:])
    assert [row[:2] for row in found] == [row[:2] for row in expected[1:]]
    assert [float(row[2]) for row in found] == pytest.approx(
        [float(row[2]) for row in expected[1:]], abs=1e-5
    )
    # Half of a part is lost; another number of processes goes on, and repairs the rest.
    content = (tmp_path / "p.1.csv").read_bytes()
    (tmp_path / "p.1.csv").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(command(classifier, many, "--out", out)[2:]) == 0
    found = [row for name in ("p.csv", "p.0.csv", "p.1.csv") for row in rows(tmp_path / name)[1:]]
    assert sorted(row[:2] for row in found) == sorted(row[:2] for row in expected[1:])
    assert 0 < len(rows(out)) - 1 < 60
    assert main(command(classifier, many, "--out", out, "--report")[2:]) == 0
    assert "120 images classified" in (tmp_path / "p.html").read_text()
