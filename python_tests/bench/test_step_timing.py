"""How a step's time follows from runs of steps, with runs that are told what to take."""

from __future__ import annotations

import pytest
import torch

from bench.settings import Settings
from bench.suites import step
from bench.suites.step import StepRun, measure_for


def test_seconds_are_per_episode_and_leave_out_the_first_step():
    assert StepRun([1.0], [5.0, 7.0, 8.0]).seconds == [2.0, 1.0]
    assert StepRun([1.0, 1.0], [5.0, 7.0, 8.0]).seconds == [1.0, 0.5]


def test_steps_on_a_cpu_are_timed_one_by_one():
    def run(steps):
        return StepRun([1.0], [0.0, 0.3, 0.5, 0.8][:steps])

    (found,) = measure_for(Settings())([run], 0.0)
    assert found["ms"] == pytest.approx(300)
    (found,) = measure_for(Settings(quick=True))([run], 0.0)
    assert found["ms"] == pytest.approx(300)


def test_steps_on_a_gpu_are_what_more_of_them_take(monkeypatch):
    now = 0.0
    monkeypatch.setattr(step.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(episodes, seconds):
        def taken(steps):
            nonlocal now
            now += 9.0 + seconds * steps  # the preparation does not count
            return StepRun([1.0] * episodes, [])

        return taken

    found = measure_for(Settings(device="cuda"))([run(1, 0.2), run(4, 0.4)], 0.0)
    assert [each["ms"] for each in found] == pytest.approx([200, 100])
