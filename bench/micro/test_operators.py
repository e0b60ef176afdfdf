"""Times of our operators alone, to compare two commits on one machine.

    pytest bench/micro --benchmark-only --benchmark-save=before
    pytest bench/micro --benchmark-only --benchmark-compare

Nothing here asserts a time.
"""

from __future__ import annotations

import pytest
import torch

from bench.settings import OURS, Settings
from bench.shapes import Point
from bench.suites.operators import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = Settings(device=DEVICE, compiles=False)
BACKENDS = [name for name, reason in SETTINGS.our_backends() if not reason]

# 5 images for a CPU, 25 for a GPU: the support sets of one and five images per class.
IMAGES = 5 if DEVICE == "cpu" else 25


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "direction", "length"),
    [
        (operator.name, direction, length)
        for operator in OPERATORS.values()
        for direction in operator.directions
        for length in ([50, 197] if operator.name == "weighted_attention" else [197])
    ],
)
def test_operator(benchmark, name, direction, length, dtype, backend) -> None:
    operator = OPERATORS[name]
    point = Point(length, head_dim=64, images=IMAGES, heads=12, num_classes=5, dtype=dtype)
    torch.manual_seed(0)
    problem = operator.problem(point, DEVICE)
    (peer,) = (p for p in operator.peers(SETTINGS) if p.name == OURS + backend)
    forward = peer.build(problem)
    problem.verify(forward, direction)
    call = problem.call(forward, direction)

    def until_the_device_is_done() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(until_the_device_is_done)
