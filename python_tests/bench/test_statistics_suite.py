"""The suite of attention statistics: every peer computes all four, and a wrong one is found."""

import pytest
import torch

from bench.cases import WrongResultError
from bench.counting import statistics_cost
from bench.formulas import plain_statistics
from bench.problems import StatisticsProblem
from bench.settings import Settings
from bench.shapes import Point
from bench.suites.operators import ATTENTION_STATISTICS, statistics_cases

POINT = Point(9, 8, images=3, heads=2, num_classes=3, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("images", [1, 3])
def test_all_peers_are_right(images: int, dtype: str) -> None:
    torch.manual_seed(0)
    problem = StatisticsProblem(Point(9, 8, images, 2, 3, dtype), "cpu")
    for peer in ATTENTION_STATISTICS.peers(Settings(compiles=False)):
        if not peer.unavailable:
            problem.verify(peer.build(problem), "forward")


@pytest.mark.parametrize(
    ("place", "name"),
    list(enumerate(("received_from_prefix", "received_from_patches", "entropy", "log_sum_exp"))),
)
def test_each_statistic_is_compared(place: int, name: str) -> None:
    problem = StatisticsProblem(POINT, "cpu")
    found = list(plain_statistics(*problem.arguments))
    problem.verify(lambda: found, "forward")
    found[place] = 1.1 * found[place]
    with pytest.raises(WrongResultError, match=f"{name} is off"):
        problem.verify(lambda: found, "forward")


def test_the_cost_is_one_product_and_each_tensor_once() -> None:
    cost = statistics_cost(POINT)
    assert cost.flops == 2 * (3 * 2) * 9 * 8 * 9
    assert cost.bytes == 4 * (2 * 3 * 2 * 9 * 8 + 3 * 9 + 4 * 3 * 2 * 9)


def test_cases_are_forward_passes_alone() -> None:
    cases = statistics_cases(Settings(quick=True))
    assert cases
    assert {(case.operator, case.direction) for case in cases} == {
        ("attention_statistics", "forward")
    }
    assert statistics_cases(Settings(quick=True, directions=("backward",))) == []
