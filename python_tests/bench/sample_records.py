"""Records as a run would write them."""

from __future__ import annotations

from typing import Any

from bench.records import Record, make_record

ATTENTION_SHAPE = {"B": 25, "H": 12, "L": 197, "d": 64}
OPERATOR_SHAPE = ATTENTION_SHAPE | {"D": 768, "E": 512, "C": 5}


def case_of(**changes: Any) -> dict[str, Any]:
    return {
        "suite": "attention",
        "operator": "weighted_attention",
        "device": "cuda",
        "dtype": "bfloat16",
        "shape": ATTENTION_SHAPE,
        "direction": "forward",
    } | changes


def records_of(case: dict[str, Any], times: dict[str, float]) -> list[Record]:
    """A record for each implementation and its milliseconds."""
    return [
        make_record(case, name, ms=ms, environment={"torch": "2.15"}) for name, ms in times.items()
    ]
