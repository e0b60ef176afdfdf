"""Times of our operators alone, to compare two commits on one machine.

    pytest bench/micro --benchmark-only --benchmark-save=before
    pytest bench/micro --benchmark-only --benchmark-compare

Nothing here asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.operators import OPERATORS, REWEIGHTED_ATTENTION, WEIGHTED_ATTENTION
from bench.settings import OURS, Settings
from bench.shapes import Point
from bench.timing import Call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = Settings(device=DEVICE, compiles=False)
BACKENDS = [name for name, reason in SETTINGS.our_backends() if not reason]
DTYPES = ("float32", "bfloat16")

# 5 images for a CPU, 25 for a GPU: the support sets of one and five images per class.
IMAGES = 5 if DEVICE == "cpu" else 25


def call_of(name: str, backend: str, point: Point, direction: str) -> Call:
    operator = OPERATORS[name]
    torch.manual_seed(0)
    problem = operator.problem(point, DEVICE)
    (peer,) = (p for p in operator.peers(SETTINGS) if p.name == OURS + backend)
    forward = peer.build(problem)
    problem.verify(forward, direction)
    return problem.call(forward, direction)


def finished(call: Call) -> Callable[[], None]:
    """The call, returning when the device is done."""

    def run() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [50, 197])
@pytest.mark.parametrize("direction", WEIGHTED_ATTENTION.directions)
def test_weighted_attention(benchmark, direction, length, dtype, backend) -> None:
    point = Point(length, head_dim=64, images=IMAGES, heads=12, num_classes=5, dtype=dtype)
    benchmark(finished(call_of("weighted_attention", backend, point, direction)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["token_relevance", "token_weights"])
def test_tokens(benchmark, name, dtype, backend) -> None:
    point = Point(197, head_dim=64, images=IMAGES, heads=12, num_classes=5, dtype=dtype)
    benchmark(finished(call_of(name, backend, point, "forward")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", REWEIGHTED_ATTENTION.directions)
def test_reweighted_attention(benchmark, direction, dtype, backend) -> None:
    point = Point(197, head_dim=64, images=IMAGES, heads=12, num_classes=5, dtype=dtype)
    benchmark(finished(call_of("reweighted_attention", backend, point, direction)))
