"""Tests of paired differences, against SciPy and published numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from tir_kernels.fewshot.run.statistics import episodes_needed, holm, mean_of_means, p_value
from tir_kernels.fewshot.run.summary import Estimate


def test_p_value_is_scipys() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 12).tolist()
    expected = stats.ttest_1samp(values, 0).pvalue
    assert p_value(Estimate.of(values)) == pytest.approx(expected, rel=1e-9)
    assert p_value(Estimate.of([0.1])) is None
    assert p_value(Estimate.of([])) is None
    assert p_value(Estimate.of([0.0, 0.0])) == 1
    assert p_value(Estimate.of([0.5, 0.5])) == 0


def test_the_mean_of_two_means_is_welchs() -> None:
    """Half of a sum has half of the difference's interval, whose degrees of freedom are Welch's."""
    draw = np.random.default_rng(0)
    first, second = draw.normal(0.6, 0.1, 9).tolist(), draw.normal(0.4, 0.3, 21).tolist()
    found = mean_of_means([Estimate.of(first), Estimate.of(second)])
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx((np.mean(first) + np.mean(second)) / 2)
    assert found.half_width == pytest.approx((welch.high - welch.low) / 4, rel=1e-9)
    assert found.episodes == 30


def test_the_mean_of_means_needs_all_of_them() -> None:
    whole = Estimate.of([0.5, 0.7])
    alone = mean_of_means([whole])
    assert (alone.episodes, alone.mean) == (2, whole.mean)
    assert alone.half_width == pytest.approx(whole.half_width)
    assert mean_of_means([whole, Estimate.of([])]) == Estimate(2, None, None)
    assert mean_of_means([whole, Estimate.of([0.2])]) == Estimate(3, 0.4, None)
    assert mean_of_means([Estimate.of([0.5, 0.5]), Estimate.of([0.7, 0.7])]) == Estimate(4, 0.6, 0)
    assert mean_of_means([]) == Estimate(0, None, None)


def test_holm_by_hand() -> None:
    """The example of R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_order_and_exceeds_no_bonferroni() -> None:
    values = np.random.default_rng(1).uniform(0, 0.2, 9).tolist()
    adjusted = holm(values)
    in_order = np.array(adjusted)[np.argsort(values)]
    assert (np.diff(in_order) >= 0).all()
    assert all(p <= own <= min(1, 9 * p) + 1e-12 for p, own in zip(values, adjusted, strict=True))


def with_effect(effect: float, episodes: int = 10) -> Estimate:
    half_width = stats.t.ppf(0.975, episodes - 1) / math.sqrt(episodes)
    return Estimate(episodes, effect, half_width)


@pytest.mark.parametrize(("effect", "number"), [(0.2, 199), (0.5, 34), (0.8, 15), (-0.5, 34)])
def test_numbers_of_a_paired_t_test(effect: float, number: int) -> None:
    """As G*Power tells for two tails, 5 % and power 0.8."""
    assert episodes_needed(with_effect(effect)) == number


def test_numbers_far_from_any_table() -> None:
    assert episodes_needed(with_effect(1e3)) == 2
    assert episodes_needed(with_effect(1e300)) == 2
    assert episodes_needed(with_effect(0.01)) == pytest.approx(78490, rel=1e-3)
    sizes = [episodes_needed(with_effect(0.06 * 1.1**i)) for i in range(80)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 2


def test_where_no_number_is_known() -> None:
    assert episodes_needed(with_effect(0.0)) is None
    assert episodes_needed(with_effect(1e-9)) is None
    assert episodes_needed(Estimate.of([0.3])) is None
    assert episodes_needed(Estimate.of([0.3, 0.3])) == 2
