"""Time measured side by side: implementations in turn, once per round, the median over the rounds.

What else the machine does then falls on all of them alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

Call = Callable[..., object]
# "ms" or "mib", or "skipped" where measuring failed, or "wrong" where the result was; and what else
# the record is to have.
Measurement = dict[str, Any]
# Calls, and the seconds for each -> their measurements
Measure = Callable[[Sequence[Call], float], list[Measurement]]

MIN_ROUNDS = 5
MIN_ROUNDS_OF_SLOW_CALLS = 3
SLOW_ROUND_SECONDS = 5.0
WARM_UP_CALLS = 2


class Clock(Protocol):
    """Takes the time of each call once, in milliseconds."""

    def round(self) -> list[float]: ...


class WallClock:
    """Time by the clock on the wall, of calls that return when they are done.

    Args:
        calls: The calls.
        burst: How often each is called in a row; its time is the mean of these.
        finish: Waits for what a burst leaves to do, which does not count.
    """

    def __init__(
        self, calls: Sequence[Call], burst: int = 1, finish: Callable[[], None] = lambda: None
    ) -> None:
        self._calls, self._burst, self._finish = calls, burst, finish
        for call in calls:
            for _ in range(max(burst, WARM_UP_CALLS)):
                call()
            finish()

    def round(self) -> list[float]:
        times = []
        for call in self._calls:
            start = time.perf_counter()
            for _ in range(self._burst):
                call()
            times.append((time.perf_counter() - start) * 1e3 / self._burst)
            self._finish()
        return times


def host_clock(calls: Sequence[Call], device: str) -> Clock:
    """Time that the host takes per call, in a burst of calls that nothing waits for.

    The calls are on tensors so small that their arithmetic takes no time. On a GPU bursts are short
    enough for its queue, which would otherwise make the host wait.
    """
    if device == "cuda":
        return WallClock(calls, 20, torch.cuda.synchronize)
    return WallClock(calls, 100)


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
        (milliseconds,) = WallClock([self._ten_flushes]).round()
        return milliseconds * 1e-4

    def _ten_flushes(self) -> None:
        for _ in range(10):
            self._buffer.sum()
        torch.cuda.synchronize()


def _queueing_seconds(call: Call) -> float:
    """Time that the host takes to queue a call on an idle GPU."""
    clock = WallClock([call], finish=torch.cuda.synchronize)
    return min(clock.round()[0] for _ in range(5)) * 1e-3


def clock_for(device: str, calls: Sequence[Call]) -> Clock:
    return DeviceClock(calls) if device == "cuda" else WallClock(calls)


def timed(clock: Callable[[Sequence[Call]], Clock], min_rounds: int = MIN_ROUNDS) -> Measure:
    """Measures calls by the median of such a clock."""

    def measure(calls: Sequence[Call], seconds: float) -> list[Measurement]:
        times = median_times(clock(calls), seconds * len(calls), min_rounds)
        return [{"ms": time} for time in times]

    return measure


def median_times(clock: Clock, seconds: float, min_rounds: int = MIN_ROUNDS) -> list[float]:
    """Median milliseconds of each call of a clock.

    Args:
        clock: Its calls are warmed up.
        seconds: For all rounds together; a few rounds are run however long they take.
        min_rounds: As many as these, or fewer of slow calls.
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
            enough = min(min_rounds, MIN_ROUNDS_OF_SLOW_CALLS) if is_slow else min_rounds
            if elapsed >= seconds and len(rounds) >= enough:
                break
    finally:
        gc.enable()
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
