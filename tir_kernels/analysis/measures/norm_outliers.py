"""Norm outliers: patches whose norm is far above that of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from tir_kernels.analysis.measures.medians import median, rank_of_largest
from tir_kernels.analysis.measures.protocol import BlockView, Finding

_DEVIATION = 1.4826  # standard deviation of a Gaussian, as a multiple of its MAD


@dataclass(frozen=True)
class NormOutliers:
    """Norms of the patches that leave a block, before any final norm (arXiv 2309.16588).

    - Largest over median norm of an image. Chance: the median of that ratio for as many independent
      Gaussian tokens of this width.
    - Share of the patches whose norm exceeds ``median + deviations · 1.4826 · MAD``, the latter
      being the median absolute deviation. Chance: that of a Gaussian, 1e-9 for 6 deviations. A
      share of 0 says that there are none; cuts in absolute numbers differ from model to model.

    None is found in a tower without patches.

    Args:
        deviations: How many robust standard deviations above the median an outlier lies.
    """

    name = "norm-outliers"

    deviations: float = 6.0

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        norms = view.output[:, view.num_prefix_tokens :].float().norm(dim=2)  # (B, N)
        count = norms.shape[1]
        if count == 0:
            return
        middle = median(norms)
        ratio_chance, tail_chance = _chances(count, view.output.shape[2], self.deviations)
        ratio = norms.amax(1) / middle
        yield Finding("largest over median norm of patches", view.block, ratio, ratio_chance)
        spread = _DEVIATION * median((norms - middle[:, None]).abs())
        is_outlier = norms > (middle + self.deviations * spread)[:, None]
        share = torch.where(middle.isnan(), torch.nan, is_outlier.float().mean(1))
        name = f"share of patches with norm above median + {self.deviations:g} MAD"
        yield Finding(name, view.block, share, tail_chance)


@lru_cache
def _chances(count: int, width: int, deviations: float) -> tuple[float, float]:
    from scipy.stats import chi, norm

    ratio = chi.ppf(rank_of_largest(count), width) / chi.ppf(0.5, width)
    return float(ratio), float(norm.sf(deviations))
