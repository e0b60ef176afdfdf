"""Numbers of every kind that callers have: what is a real or a whole number is taken as one."""

from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import tir_kernels
from tir_kernels import JointSpace, WeightRule
from tir_kernels.operators.dropout import philox_dropout
from tir_kernels.scalars import finite_number, real_number, whole_number

Q, WEIGHTS = torch.randn(1, 2, 6, 8), torch.rand(1, 6)
TOKENS, CLASSES = torch.randn(1, 6, 8), torch.randn(4, 8)
ROWS, SEEDS, STEP = torch.randn(2, 3, 4, 8), torch.tensor([3, 5]), torch.tensor([7])

REALS = [np.float64, np.float32, np.float16, np.longdouble, Fraction, np.int8]
WHOLES = [np.int64, np.int32, np.uint8, np.array]


def attend(scale: object) -> torch.Tensor:
    return tir_kernels.weighted_attention(Q, Q, Q, WEIGHTS, scale=scale)


def reweigh(scale: object) -> torch.Tensor:
    return tir_kernels.reweighted_attention(Q, Q, Q, TOKENS, CLASSES, scale=scale)


def weigh(**rule: object) -> torch.Tensor:
    return tir_kernels.token_weights(TOKENS, CLASSES, rule=WeightRule(**rule)).weights


def relate(norm_eps: object) -> torch.Tensor:
    space = JointSpace(norm_eps=norm_eps)
    return tir_kernels.token_relevance(TOKENS, CLASSES, joint_space=space)


def drop(**options: object) -> torch.Tensor:
    return philox_dropout(ROWS, SEEDS, STEP, **options)


REAL_CALLS: list[Callable] = [
    attend,
    reweigh,
    lambda x: weigh(strength=x),
    lambda x: weigh(center=x),
    lambda x: weigh(top_ratio=x),
    relate,
]
WHOLE_CALLS: list[Callable] = [
    lambda n: tir_kernels.token_relevance(TOKENS, CLASSES, num_prefix_tokens=n),
    lambda n: tir_kernels.token_weights(TOKENS, CLASSES, num_prefix_tokens=n).weights,
    lambda n: tir_kernels.reweighted_attention(Q, Q, Q, TOKENS, CLASSES, num_prefix_tokens=n),
    lambda n: WeightRule().table(n),
    lambda n: drop(stream=n),
    lambda n: drop(first_branch=n),
    lambda n: drop(num_branches=n),
]


@pytest.mark.parametrize("kind", REALS)
@pytest.mark.parametrize("call", REAL_CALLS)
def test_real_numbers(call: Callable, kind: type) -> None:
    assert torch.equal(call(kind(1)), call(1.0))


@pytest.mark.parametrize("kind", WHOLES)
@pytest.mark.parametrize("call", WHOLE_CALLS)
def test_whole_numbers(call: Callable, kind: type) -> None:
    assert torch.equal(call(kind(2)), call(2))


@pytest.mark.parametrize("call", REAL_CALLS)
@pytest.mark.parametrize("value", [True, np.True_, "1", 1j, Decimal(1), torch.tensor(1.0), [1.0]])
def test_what_is_no_real_number_is_refused(call: Callable, value: object) -> None:
    with pytest.raises(TypeError):
        call(value)


@pytest.mark.parametrize("call", WHOLE_CALLS)
@pytest.mark.parametrize(
    "value", [True, np.True_, "1", 1.0, np.float32(1), torch.tensor(1), np.array([1, 2])]
)
def test_what_is_no_whole_number_is_refused(call: Callable, value: object) -> None:
    with pytest.raises(TypeError, match=r"must be an int; got"):
        call(value)


def test_probabilities() -> None:
    for half in (np.float32(0.5), Fraction(1, 2)):
        assert torch.equal(drop(probability=half), drop(probability=0.5))
    for value in (True, "0.5", Decimal("0.5"), torch.tensor(0.5)):
        with pytest.raises(TypeError, match=r"^probability must be a number"):
            drop(probability=value)
    with pytest.raises(ValueError, match=r"^probability must lie in"):
        drop(probability=np.nan)


def test_a_rule_keeps_pythons_own_numbers() -> None:
    rule = WeightRule("linear", np.float32(0.5), np.int64(3), np.float64(0.25))
    assert rule == WeightRule("linear", 0.5, 3.0, 0.25)
    assert hash(rule) == hash(WeightRule("linear", 0.5, 3.0, 0.25))
    assert all(type(n) is float for n in (rule.strength, rule.center, rule.top_ratio))
    assert type(JointSpace(norm_eps=np.float32(1e-5)).norm_eps) is float


@pytest.mark.parametrize("value", [10**400, Fraction(-(10**400)), np.longdouble("inf"), np.nan])
def test_what_no_float_can_hold_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"^scale must be finite"):
        attend(value)
    with pytest.raises(ValueError, match=r"^strength must be finite"):
        WeightRule(strength=value)


def test_conversions() -> None:
    assert real_number("x", 10**400) == float("inf")
    assert type(finite_number("x", np.float32(0.1))) is float
    assert type(whole_number("n", np.uint8(200))) is int
    with pytest.raises(TypeError, match=r"^x must be a number in meters; got str"):
        finite_number("x", "1", "a number in meters")


def test_weights_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strength=1e[+]?39.*5 classes weights beyond float32"):
        WeightRule(strength=1e39).table(5)
    assert WeightRule(strength=1e37).table(5).isfinite().all()


def test_numbers_inside_a_compiled_function() -> None:
    def attend_scaled(q: torch.Tensor) -> torch.Tensor:
        return tir_kernels.weighted_attention(q, q, q, WEIGHTS, scale=0.25)

    compiled = torch.compile(attend_scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(Q), attend_scaled(Q))
