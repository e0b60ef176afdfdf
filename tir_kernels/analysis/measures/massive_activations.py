"""Massive activations: single numbers of tokens that dwarf all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tir_kernels.analysis.measures.medians import median, rank_of_largest
from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass(frozen=True)
class MassiveActivations:
    """Largest absolute number among all tokens that leave a block (arXiv 2402.17762).

    An activation is massive if ``|x|`` exceeds ``above`` and ``times_median`` times the image's
    median ``|x|`` at once. Reported for each image: the largest ``|x|`` and its ratio to the
    median, with the chance level of as many independent Gaussian numbers of that median, and the
    number of massive ones, of which chance has none. Class token and registers are counted, since
    they may hold them.

    Args:
        above: The absolute bound.
        times_median: The relative bound.
    """

    name = "massive-activations"

    above: float = 100.0
    times_median: float = 1000.0

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        sizes = view.output.float().abs().flatten(1)  # (B, L D)
        middle, largest = median(sizes), sizes.amax(1)
        chance = _largest_over_median(sizes.shape[1])
        yield Finding("largest activation", view.block, largest, chance * middle)
        yield Finding("largest over median activation", view.block, largest / middle, chance)
        is_massive = (sizes > self.above) & (sizes > self.times_median * middle[:, None])
        yield Finding("massive activations", view.block, is_massive.sum(1).float(), 0.0)


@lru_cache
def _largest_over_median(count: int) -> float:
    from scipy.stats import halfnorm

    return float(halfnorm.ppf(rank_of_largest(count)) / halfnorm.ppf(0.5))
