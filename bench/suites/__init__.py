"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case
from bench.settings import Settings

from .attention import attention_cases
from .episodes import episode_cases
from .memory import memory_cases
from .operator import operator_cases
from .relevance import relevance_cases
from .savings import savings_cases
from .statistics import statistics_cases
from .step import step_cases

SUITES: dict[str, Callable[[Settings], list[Case]]] = {
    "attention": attention_cases,
    "relevance": relevance_cases,
    "operator": operator_cases,
    "statistics": statistics_cases,
    "step": step_cases,
    "savings": savings_cases,
    "memory": memory_cases,
    "episodes": episode_cases,
}
