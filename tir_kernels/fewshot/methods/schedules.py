"""Schedules of learning rates: a step, counted from 0 -> factor of the group's rate."""

from __future__ import annotations

import math
from collections.abc import Callable


def cosine(steps: int, *, warm_up: int = 0, warm_up_factor: float = 0.0) -> Callable[[int], float]:
    """Half a cosine from 1 down to 0 over so many steps, behind some at a constant factor.

    Args:
        steps: Steps over which the rate would fall to 0; more than are taken keep it above.
        warm_up: Steps at ``warm_up_factor`` in front, which put the cosine off by as many.
        warm_up_factor: Factor of these.
    """

    def factor(step: int) -> float:
        if step < warm_up:
            return warm_up_factor
        return (1 + math.cos(math.pi * (step - warm_up) / steps)) / 2

    return factor


WARM_UP_RATE = 1e-5  # of CoOp's program and those that are built on it


def warmed_cosine(steps: int, rate: float) -> Callable[[int], float]:
    """The schedule of CoOp's program: one step at 1e-5, or at the rate if that is less; a cosine.

    Args:
        steps: Steps of the training, the first included.
        rate: The group's learning rate.
    """
    factor = min(1.0, WARM_UP_RATE / rate) if rate else 1.0
    return cosine(max(steps, 1), warm_up=1, warm_up_factor=factor)
