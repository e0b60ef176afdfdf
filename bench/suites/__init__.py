"""The suites by name; each is imported when it is asked for."""

from __future__ import annotations

# Name -> "module:function" that makes the suite's cases of the settings.
SUITES = {
    "attention": "bench.suites.operators:attention_cases",
    "short": "bench.suites.short:short_cases",
    "relevance": "bench.suites.operators:relevance_cases",
    "operator": "bench.suites.operators:operator_cases",
    "statistics": "bench.suites.operators:statistics_cases",
    "step": "bench.suites.step:step_cases",
    "savings": "bench.suites.savings:savings_cases",
    "memory": "bench.suites.memory:memory_cases",
    "episodes": "bench.suites.episodes:episode_cases",
}
