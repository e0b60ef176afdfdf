"""Tests of paired differences: is one there, and how many episodes would it take to see it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats

from tir_kernels.fewshot.run.summary import Estimate

SIGNIFICANCE = 0.05
_MOST_EPISODES = 10**7
_LARGE = 2000
_CERTAIN_SHIFT = 100.0


def p_value(estimate: Estimate) -> float | None:
    """Of a paired two-sided t test that the mean is 0; ``None`` for fewer than two episodes."""
    if estimate.mean is None or estimate.half_width is None:
        return None
    if estimate.half_width == 0:  # the same difference in every episode
        return 1.0 if estimate.mean == 0 else 0.0
    error = _standard_error(estimate.episodes, estimate.half_width)
    return float(2 * stats.t.sf(abs(estimate.mean) / error, estimate.episodes - 1))


def _standard_error(episodes: int, half_width: float) -> float:
    """Of a mean whose 95 % confidence interval is this wide to each side."""
    return half_width / float(stats.t.ppf(0.975, episodes - 1))


def mean_of_means(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent means, each of which weighs alike, such as those of data sets.

    Its interval tells what the episodes leave open, not what other data sets would give: degrees of
    freedom after Welch and Satterthwaite.

    Returns:
        The mean over all their episodes; without one if an estimate has none, and without an
        interval if one has none.
    """
    episodes = sum(each.episodes for each in estimates)
    means = [each.mean for each in estimates if each.mean is not None]
    if not means or len(means) < len(estimates):
        return Estimate(episodes, None, None)
    mean = math.fsum(means) / len(means)
    variances: list[float] = []
    freedom = 0.0  # of the variances' sum, as the denominator of its square
    for each in estimates:
        if each.half_width is None:
            return Estimate(episodes, mean, None)
        variance = _standard_error(each.episodes, each.half_width) ** 2
        variances.append(variance)
        freedom += variance**2 / (each.episodes - 1)
    total = math.fsum(variances)
    if freedom == 0:
        return Estimate(episodes, mean, 0.0)
    quantile = float(stats.t.ppf(0.975, total**2 / freedom))
    return Estimate(episodes, mean, quantile * math.sqrt(total) / len(means))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values that hold for all of them together, by Holm's step-down procedure.

    Sorted upwards, p number i of m is multiplied by m - i (i from 0), and none is smaller than one
    before it (Holm, Scandinavian Journal of Statistics 6, 1979). ``None`` is no test.
    """
    order = sorted((p, position) for position, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for number, (p, position) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - number) * p))
        adjusted[position] = largest
    return adjusted


def episodes_needed(
    estimate: Estimate, power: float = 0.8, significance: float = SIGNIFICANCE
) -> int | None:
    """The least number of episodes at which a paired two-sided t test would see this difference.

    The difference and its spread are taken to be those that were found; power is that of the
    noncentral t distribution.

    Returns:
        ``None`` where there is no difference, no spread is known, or ten million do not suffice.
    """
    if not estimate.mean or estimate.half_width is None:
        return None
    error = _standard_error(estimate.episodes, estimate.half_width)
    spread = error * math.sqrt(estimate.episodes)
    if spread == 0:
        return 2
    effect = abs(estimate.mean) / spread

    def suffices(number: int) -> bool:
        quantile = stats.t.ppf(1 - significance / 2, number - 1)
        # Beyond, where the distribution can't be computed any more, power is 1 at any number.
        shift = min(effect * math.sqrt(number), _CERTAIN_SHIFT)
        # The chance to see a difference of the other sign is nothing beside this.
        return bool(stats.nct.sf(quantile, number - 1, shift) >= power)

    # Of a normal distribution, which needs one or two less, and which large numbers tend to.
    quantiles = stats.norm.ppf(1 - significance / 2) + stats.norm.ppf(power)
    number = max(2, math.ceil((quantiles / effect) ** 2))
    if number > _LARGE:
        return number if number <= _MOST_EPISODES else None
    return next((each for each in range(max(2, number - 2), number + 50) if suffices(each)), None)
