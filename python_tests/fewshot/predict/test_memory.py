"""The memory of a prediction does not grow with the number of images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="needs Linux's /proc, to read peak memory"
    ),
]

MIB = 2**20


def peaks(folder, kind, *counts):
    """Peak memory, in bytes, after each number of images."""
    script = Path(__file__).with_name("many_images.py")
    done = subprocess.run(
        [sys.executable, script, kind, folder, *map(str, counts)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ten_times_as_many_images_take_as_much(tmp_path):
    """An image of those that are decoded here has 3 KiB of pixels, so that 18000 have 54 MiB."""
    few, many = peaks(tmp_path, "images", 2_000, 20_000)
    assert many - few < 8 * MIB


def test_names_take_no_memory_before_they_have_rows_and_little_after(tmp_path):
    """A name and its place in a list have more than 100 bytes, so that 198000 have 19 MiB."""
    few, _, many, again = peaks(tmp_path, "names", 2_000, 200_000)
    assert many - few < 14 * MIB
    assert again - few < 14 * MIB + 200_000 * 50
