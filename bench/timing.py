"""Time measured side by side: implementations in turn, once per round, the median over the rounds.

What else the machine does then falls on all of them alike.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[..., Any]
# "ms" or "mib", or "skipped" where measuring failed, or "wrong" where the result was; and what else
# the record is to have.
Measurement = dict[str, Any]
# Calls, and the seconds for each -> their measurements
Measure = Callable[[Sequence[Call], float], list[Measurement]]

MIN_ROUNDS = 5
MIN_ROUNDS_OF_SLOW_CALLS = 3
SLOW_ROUND_SECONDS = 5.0
WARM_UP_CALLS = 2
MAX_FLUSHES = 40


# Takes the time of each of its calls once, in milliseconds.
Clock = Callable[[], list[float]]


def wall_clock(
    calls: Sequence[Call], burst: int = 1, finish: Callable[[], None] = lambda: None
) -> Clock:
    """Time by the clock on the wall, of calls that return when they are done.

    Args:
        calls: The calls.
        burst: How often each is called in a row; its time is the mean of these.
        finish: Waits for what a burst leaves to do, which does not count.
    """
    for call in calls:
        for _ in range(max(burst, WARM_UP_CALLS)):
            call()
        finish()

    def times() -> list[float]:
        found = []
        for call in calls:
            start = time.perf_counter()
            for _ in range(burst):
                call()
            found.append((time.perf_counter() - start) * 1e3 / burst)
            finish()
        return found

    return times


def host_clock(calls: Sequence[Call], device: str) -> Clock:
    """Time that the host takes per call, in a burst of calls that nothing waits for.

    The calls are on tensors so small that their arithmetic takes no time. On a GPU bursts are short
    enough for its queue, which would otherwise make the host wait.
    """
    if device == "cuda":
        return wall_clock(calls, 20, torch.cuda.synchronize)
    return wall_clock(calls, 100)


def device_clock(calls: Sequence[Call]) -> Clock:
    """Time on the GPU between two events, with a cold L2 cache.

    Before each call a buffer larger than the cache is read. Reading, not writing: written lines
    would have to leave the cache during the call. It is read often enough to keep the GPU busy
    until the host has queued the whole call, so that gaps between launches do not count; what the
    host takes is a record of its own ("host time").
    """
    cache_bytes = torch.cuda.get_device_properties().L2_cache_size
    buffer = torch.ones(max(2**28, 4 * cache_bytes) // 4, device="cuda")

    def flush(times: int) -> None:
        for _ in range(times):
            buffer.sum()

    def ten_flushes() -> None:
        flush(10)
        torch.cuda.synchronize()

    (of_ten,) = wall_clock([ten_flushes])()
    flushes = []
    for call in calls:
        # The time that the host takes to queue the call on an idle GPU.
        queueing = wall_clock([call], finish=torch.cuda.synchronize)
        head_start = 1.5 * min(queueing()[0] for _ in range(5)) / (of_ten / 10)
        flushes.append(min(1 + math.ceil(head_start), MAX_FLUSHES))

    def times() -> list[float]:
        events = []
        for call, number in zip(calls, flushes, strict=True):
            flush(number)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    return times


def clock_for(device: str, calls: Sequence[Call]) -> Clock:
    return device_clock(calls) if device == "cuda" else wall_clock(calls)


def timed(clock: Callable[[Sequence[Call]], Clock], min_rounds: int = MIN_ROUNDS) -> Measure:
    """Measures calls by the median of such a clock."""

    def measure(calls: Sequence[Call], seconds: float) -> list[Measurement]:
        times = median_times(clock(calls), seconds * len(calls), min_rounds)
        return [{"ms": time} for time in times]

    return measure


def attempts(calls: Sequence[Call], seconds: float) -> list[Measurement]:
    """Each call once, for its own measurement, or why it failed: no memory, a loss that is NaN."""

    def attempt(call: Call) -> Measurement:
        try:
            return call()
        except RuntimeError as error:
            return {"skipped": str(error)}

    return [attempt(call) for call in calls]


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
            rounds.append(clock())
            elapsed = time.perf_counter() - start
            is_slow = elapsed / len(rounds) > SLOW_ROUND_SECONDS
            enough = min(min_rounds, MIN_ROUNDS_OF_SLOW_CALLS) if is_slow else min_rounds
            if elapsed >= seconds and len(rounds) >= enough:
                break
    finally:
        gc.enable()
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
