"""Rounds and medians, with a clock that is told what to say; and the real clocks where they run."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch
from click.testing import CliRunner

from bench import sanitizer_cases, timing
from bench.command import main
from bench.timing import clock_for, host_clock, median_times, wall_clock


class ToldClock:
    """Says the given rounds over and over, each after sleeping a while."""

    def __init__(self, rounds, sleep=0.0):
        self._rounds = itertools.cycle(rounds)
        self._sleep = sleep
        self.count = 0

    def __call__(self):
        time.sleep(self._sleep)
        self.count += 1
        return next(self._rounds)


def test_medians_of_each_call():
    clock = ToldClock([[1.0, 10.0], [2.0, 90.0], [9.0, 20.0], [3.0, 30.0], [2.5, 25.0]])
    assert median_times(clock, 0.0) == [2.5, 25.0]
    assert clock.count == timing.MIN_ROUNDS


def test_rounds_fill_the_time():
    clock = ToldClock([[1.0]], sleep=0.002)
    median_times(clock, 0.05)
    assert clock.count > timing.MIN_ROUNDS


def test_slow_calls_take_fewer_rounds(monkeypatch):
    monkeypatch.setattr(timing, "SLOW_ROUND_SECONDS", 0.001)
    clock = ToldClock([[1.0]], sleep=0.01)
    median_times(clock, 0.0)
    assert clock.count == timing.MIN_ROUNDS_OF_SLOW_CALLS


def test_calls_take_turns():
    order = []
    clock = wall_clock([lambda: order.append("a"), lambda: order.append("b")])
    order.clear()
    clock()
    clock()
    assert order == ["a", "b", "a", "b"]


def test_host_time_is_per_call():
    calls = []
    (milliseconds,) = host_clock([lambda: calls.append(1)], "cpu")()
    assert milliseconds > 0
    assert len(calls) == 200  # a burst to warm up, a burst to measure


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_sanitizer_cases_need_a_gpu(capsys):
    assert sanitizer_cases.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_device_clock():
    tensor = torch.randn(64, 64, device="cuda")
    assert all(t > 0 for t in median_times(clock_for("cuda", [tensor.sum, tensor.exp]), 0.0))


@pytest.mark.gpu
@pytest.mark.usefixtures("low_ceilings")
def test_every_suite_on_a_gpu(tmp_path):
    path = tmp_path / "records.json"
    suites = ["attention", "relevance", "operator", "memory"]
    grid = ["--lengths", "50", "--heads", "12", "--widths", "64", "--classes", "5"]
    options = ["--device", "cuda", "--no-compile", "--seconds", "0", "--json", str(path)]
    result = CliRunner().invoke(main, [*suites, *options, *grid, "--dtypes", "bfloat16"])
    assert result.exit_code == 0, result.output
    records = json.loads(path.read_text())
    assert {r["suite"] for r in records} == set(suites)
    assert {"forward", "backward", "forward+backward"} == {r["direction"] for r in records}
