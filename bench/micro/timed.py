"""The timing of small benchmarks on whichever device there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure_rounds(
    benchmark: Any, run: Callable[[], Any], rounds: int, warmup_rounds: int = 1
) -> None:
    """Time a function, each round until the device is done."""

    def run_to_the_end() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run_to_the_end, rounds=rounds, warmup_rounds=warmup_rounds)
