"""Count histogram: the shares of patches that 0, 1, …, C classes select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass(frozen=True)
class CountHistogram:
    """Share of an image's patches for each count of classes that select them (arXiv 2605.25799).

    Chance: the binomial law of C classes that select a share k of the patches each, independently
    of one another. None is found without classes or patches.
    """

    name = "count-histogram"

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        patches = view.hidden.shape[1] - view.num_prefix_tokens
        if not view.num_classes or not patches:
            return
        chances = _binomial(view.num_classes, int(patches * view.top_ratio) / patches)
        for count, chance in enumerate(chances):
            share = (view.counts == count).float().mean(1)
            yield Finding(f"share of patches with count {count}", view.block, share, chance)


@lru_cache
def _binomial(draws: int, probability: float) -> tuple[float, ...]:
    from scipy.stats import binom

    return tuple(binom.pmf(range(draws + 1), draws, probability).tolist())
