"""The machine's ceilings, measured in the same run, and the time below which nothing can go."""

from __future__ import annotations

import functools
import statistics

import torch

from .counting import Cost
from .settings import DTYPES
from .timing import Call, clock_for, median_times

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
_SECONDS = 0.3


@functools.cache
def bytes_per_second(device: str) -> float:
    """Rate of a large copy, bytes read and bytes written both counted."""
    size = _COPY_BYTES[device]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(device, lambda: target.copy_(source))


def flops_per_second(device: str, dtype: str) -> float:
    """Rate of a large matrix product now; two operations per multiplication and addition.

    On a CPU that multiplies no numbers of 16 bits, it is that of float32: they can be converted.
    """
    rate = _product_rate(device, dtype)
    if device != "cpu" or dtype == "float32":
        return rate
    return max(rate, known_flops_per_second(device, "float32"))


@functools.cache
def known_flops_per_second(device: str, dtype: str) -> float:
    """The same as it was when first asked for: a GPU has it to itself, a CPU often has not."""
    return flops_per_second(device, dtype)


def _product_rate(device: str, dtype: str) -> float:
    size = _PRODUCT_SIZE[device]
    left, right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / _seconds(device, lambda: left @ right)


@torch.no_grad()
def _seconds(device: str, call: Call) -> float:
    (milliseconds,) = median_times(clock_for(device, [call]), _SECONDS)
    return milliseconds * 1e-3


def bound_ms(cost: Cost, device: str, *rates: float) -> float:
    """The time below which the useful work cannot be done: memory or arithmetic, the longer.

    Args:
        cost: The work.
        device: "cpu" or "cuda".
        *rates: Operations per second, measured before and after what the bound is for.
    """
    return shortest_ms(cost, bytes_per_second(device), statistics.fmean(rates))


def shortest_ms(cost: Cost, bytes_per_second: float, flops_per_second: float) -> float:
    """The same where the machine's rates are given."""
    return 1e3 * max(cost.bytes / bytes_per_second, cost.flops / flops_per_second)
