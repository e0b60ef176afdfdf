"""Relevance, and the token weights that follow from it."""

from __future__ import annotations

from bench.cases import Case
from bench.operators import TOKEN_RELEVANCE, TOKEN_WEIGHTS
from bench.settings import Settings
from bench.shapes import points

from .common import FIRST, LAST, operator_case


def relevance_cases(settings: Settings) -> list[Case]:
    if not settings.wants("forward"):
        return []
    found = points("relevance", settings)
    cases = []
    for operator in (TOKEN_WEIGHTS, TOKEN_RELEVANCE):
        for point in found:
            has_target = operator is TOKEN_WEIGHTS and point.num_classes == 5
            is_main = has_target and point.dtype == "bfloat16" and point.length == 197
            priority = FIRST if is_main else LAST
            cases.append(
                operator_case("relevance", operator, point, "forward", settings, priority=priority)
            )
    return cases
