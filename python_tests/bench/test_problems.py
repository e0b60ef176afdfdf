"""Wrong results are found, right ones pass."""

import pytest
import torch

from bench.cases import WrongResultError
from bench.formulas import plain_attention, plain_token_weights
from bench.problems import AttentionProblem, TokenWeightsProblem
from bench.settings import Settings
from bench.shapes import Point, points, split_heads
from bench.suites.operators import OPERATORS, WEIGHTED_ATTENTION


def attention_problem():
    torch.manual_seed(0)
    return AttentionProblem(Point(9, 8, images=3, heads=2, num_classes=3, dtype="float32"), "cpu")


def test_tensors_are_views_of_one_projection():
    problem = attention_problem()
    assert {leaf.stride() for leaf in problem.leaves} == {(9 * 3 * 2 * 8, 8, 3 * 2 * 8, 1)}
    pointers = [leaf.untyped_storage().data_ptr() for leaf in problem.leaves]
    assert len(set(pointers)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("name", ["weighted_attention", "reweighted_attention"])
def test_all_peers_are_right(name, direction, dtype):
    settings = Settings(compiles=False)
    operator = OPERATORS[name]
    torch.manual_seed(0)
    point = Point(9, 8, images=3, heads=2, num_classes=3, dtype=str(dtype).removeprefix("torch."))
    problem = operator.problem(point, "cpu")
    for peer in operator.peers(settings):
        if not peer.unavailable:
            problem.verify(peer.build(problem), direction, is_weighted=peer.is_weighted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["token_relevance", "token_weights"])
def test_all_token_peers_are_right(name, dtype):
    operator = OPERATORS[name]
    torch.manual_seed(0)
    problem = operator.problem(Point(50, 8, 3, 4, 7, dtype), "cpu")
    for peer in operator.peers(Settings(compiles=False)):
        if not peer.unavailable:
            problem.verify(peer.build(problem), "forward")


def test_attention_without_its_weights_is_wrong():
    problem = attention_problem()
    ones = torch.ones_like(problem.weights)
    with pytest.raises(WrongResultError, match="output is off"):
        problem.verify(lambda: plain_attention(*problem.leaves, ones), direction="forward")


def test_a_wrong_gradient_is_found():
    problem = attention_problem()
    query, key, value = problem.leaves

    def forward():
        return plain_attention(query, key.detach() + 0 * key, value, problem.weights)

    problem.verify(forward, "forward")
    with pytest.raises(WrongResultError, match="gradient of k"):
        problem.verify(forward, "forward+backward")


def test_nan_and_shapes_are_found():
    problem = attention_problem()
    query = problem.leaves[0].detach()
    for wrong in (query * float("nan"), query[..., :4]):
        with pytest.raises(WrongResultError, match="output"):
            problem.verify(lambda wrong=wrong: wrong, "forward")


def test_wrong_weights_are_found():
    torch.manual_seed(0)
    problem = TokenWeightsProblem(Point(50, 4, 2, 4, 5, "float32"), "cpu")
    right = plain_token_weights(*problem.arguments)
    problem.verify_counts(right)
    with pytest.raises(WrongResultError, match="selections"):
        problem.verify_counts(right.roll(1, 0))
    with pytest.raises(WrongResultError, match="rule"):
        problem.verify_counts(torch.cat([right[:, :1], right[:, 1:] + 0.1], 1))
    with pytest.raises(WrongResultError, match="prefix"):
        problem.verify_counts(right + 0.5)


def test_peers_without_compiler_are_named():
    reasons = {p.name: p.unavailable for p in WEIGHTED_ATTENTION.peers(Settings(compiles=False))}
    assert "--no-compile" in reasons["torch.compile"]
    assert "--no-compile" in reasons["flex_attention"]


@pytest.mark.parametrize(
    ("product", "expected"), [(60, (5, 12)), (3072, (256, 12)), (4, (1, 4)), (17, (17, 1))]
)
def test_heads_are_split(product, expected):
    assert split_heads(product) == expected


def test_filters_replace_sizes_and_repeat_nothing():
    settings = Settings(lengths=(7,), heads=(24,), widths=(16,), dtypes=("float32",))
    assert points("attention", settings) == [Point(7, 16, 2, 12, 5, "float32")]
