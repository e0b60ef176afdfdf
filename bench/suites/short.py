"""Attention of at most 256 tokens, where fused kernels are known to tie or lose; and beside it
single queries and causal texts."""

from __future__ import annotations

from dataclasses import replace

from bench.cases import Case
from bench.settings import Settings
from bench.shapes import points, unusual_points

from .operators import LAST, SECOND, WEIGHTED_ATTENTION, operator_case


def short_cases(settings: Settings) -> list[Case]:
    """Weighted attention of short rows, against everything PyTorch has for it."""
    directions = [
        direction for direction in ("forward", "forward+backward") if settings.wants(direction)
    ]
    found = []
    for point in (*points("short", settings), *unusual_points(settings)):
        is_usual = point.queries is None and not point.is_causal
        for direction in directions:
            case = operator_case("short", WEIGHTED_ATTENTION, point, direction, settings)
            found.append(replace(case, priority=LAST if is_usual else SECOND))
    return found
