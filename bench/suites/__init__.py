"""The suites by name; each is imported when it is asked for."""

from __future__ import annotations

# Name -> "module:function" that makes the suite's cases of the settings.
SUITES = {
    "attention": "bench.suites.attention:attention_cases",
    "statistics": "bench.suites.statistics:statistics_cases",
    "relevance": "bench.suites.relevance:relevance_cases",
    "operator": "bench.suites.operator:operator_cases",
    "step": "bench.suites.step:step_cases",
    "savings": "bench.suites.savings:savings_cases",
    "memory": "bench.suites.memory:memory_cases",
    "episodes": "bench.suites.episodes:episode_cases",
}
