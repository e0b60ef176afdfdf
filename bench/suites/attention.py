"""Weighted attention against everything PyTorch has for it."""

from __future__ import annotations

import functools

from bench.cases import Case
from bench.operators import WEIGHTED_ATTENTION
from bench.settings import Settings
from bench.shapes import Point, points

from .common import FIRST, LAST, SECOND, operator_case


def attention_cases(settings: Settings) -> list[Case]:
    directions = WEIGHTED_ATTENTION.directions
    if settings.device == "cpu" and settings.directions is None:
        directions = ("forward", "forward+backward")
    suite = functools.partial(operator_case, "attention", WEIGHTED_ATTENTION)
    return [
        suite(point, direction, settings, priority=_priority(point, direction))
        for point in points("attention", settings)
        for direction in directions
        if settings.wants(direction)
    ]


def _priority(point: Point, direction: str) -> int:
    heads = point.images * point.heads
    is_main = point.dtype == "bfloat16" and point.head_dim == 64 and point.length < 1024
    if not is_main or heads < 300 or direction == "forward+backward":
        return LAST
    return FIRST if heads == 768 else SECOND
