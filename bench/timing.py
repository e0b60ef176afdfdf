"""Time measured side by side: implementations in turn, once per round, the median over the rounds.

What else the machine does then falls on all of them alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]

MIN_ROUNDS = 5
MIN_ROUNDS_OF_SLOW_CALLS = 3
SLOW_ROUND_SECONDS = 5.0
WARM_UP_CALLS = 2


class Clock(Protocol):
    """Takes the time of each call once, in milliseconds."""

    def round(self) -> list[float]: ...


class WallClock:
    """Time by the clock on the wall, of calls that return when they are done."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        for call in calls:
            for _ in range(WARM_UP_CALLS):
                call()

    def round(self) -> list[float]:
        times = []
        for call in self._calls:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times


class DeviceClock:
    """Time on the GPU between two events, with a cold L2 cache.

    Before each call a buffer larger than the cache is read. Reading, not writing: written lines
    would have to leave the cache during the call. It is read often enough to keep the GPU busy
    until the host has queued the whole call, so that gaps between launches do not count; what the
    host takes is a record of its own ("host time").
    """

    _MAX_FLUSHES = 40

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls
        cache_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._buffer = torch.ones(max(2**28, 4 * cache_bytes) // 4, device="cuda")
        flush_seconds = self._flush_seconds()
        self._flushes = []
        for call in calls:
            for _ in range(WARM_UP_CALLS):
                call()
            head_start = 1.5 * _queueing_seconds(call) / flush_seconds
            self._flushes.append(min(1 + math.ceil(head_start), self._MAX_FLUSHES))

    def round(self) -> list[float]:
        events = []
        for call, flushes in zip(self._calls, self._flushes, strict=True):
            for _ in range(flushes):
                self._buffer.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def _flush_seconds(self) -> float:
        self._buffer.sum()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            self._buffer.sum()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / 10


def _queueing_seconds(call: Call) -> float:
    """Time that the host takes to queue a call on an idle GPU."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(times)


class HostClock:
    """Time that the host takes per call, in a burst of calls that nothing waits for.

    Args:
        calls: On tensors so small that their arithmetic takes no time.
        device: "cuda": the bursts are short enough for the queue of the GPU, which would otherwise
            make the host wait.
    """

    def __init__(self, calls: Sequence[Call], device: str) -> None:
        self._calls = calls
        self._burst = 20 if device == "cuda" else 100
        self._finish = torch.cuda.synchronize if device == "cuda" else lambda: None
        for call in calls:
            for _ in range(self._burst):
                call()
            self._finish()

    def round(self) -> list[float]:
        times = []
        for call in self._calls:
            start = time.perf_counter()
            for _ in range(self._burst):
                call()
            times.append((time.perf_counter() - start) * 1e3 / self._burst)
            self._finish()
        return times


def clock_for(device: str, calls: Sequence[Call]) -> Clock:
    return DeviceClock(calls) if device == "cuda" else WallClock(calls)


def median_times(clock: Clock, seconds: float) -> list[float]:
    """Median milliseconds of each call of a clock.

    Args:
        clock: Its calls are warmed up.
        seconds: For all rounds together; a few rounds are run however long they take.
    """
    rounds: list[list[float]] = []
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while True:
            rounds.append(clock.round())
            elapsed = time.perf_counter() - start
            is_slow = elapsed / len(rounds) > SLOW_ROUND_SECONDS
            enough = MIN_ROUNDS_OF_SLOW_CALLS if is_slow else MIN_ROUNDS
            if elapsed >= seconds and len(rounds) >= enough:
                break
    finally:
        gc.enable()
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
