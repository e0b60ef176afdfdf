"""Relevance by count: how close simple and hard tokens are to the classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from tir_kernels.analysis.measures.first_sight import FirstSight
from tir_kernels.analysis.measures.norms_by_count import mean_over
from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass
class RelevanceByCount:
    """Cosine of simple and of hard patches with the classes (arXiv 2605.25799).

    Simple patches are selected by all C classes, hard ones by one; at C = 1 they are the same. For
    each kind, a patch's cosine with its closest class, and the margin by which its cosine with the
    class of its image exceeds the mean of the other classes', are averaged over the patches.

    The sets are those of the first pass, kept block by block ("first"), and those of this pass
    ("present"): a set that is chosen anew by its cosines cannot show that they change. Chance: for
    the cosine, the mean over all the image's patches, as of patches drawn at random; for the margin
    0, as of labels drawn at random. None is found in an image without such patches; no margin
    without labels, or with one class.
    """

    name = "relevance-by-count"

    _first: FirstSight = field(default_factory=FirstSight, init=False, repr=False)

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        if not view.num_classes:
            return
        closest = view.relevance.amax(1)  # (B, N)
        everywhere, margin = closest.mean(1), _margin(view)
        sets = {"first": self._first.of(view.block, view.counts), "present": view.counts}
        for age, counts in sets.items():
            for kind, count in (("simple", view.num_classes), ("hard", 1)):
                chosen, patches = counts == count, f"{age} {kind} patches"
                values = mean_over(chosen, closest)
                yield Finding(f"closest class of {patches}", view.block, values, everywhere)
                if margin is not None:
                    values = mean_over(chosen, margin)
                    yield Finding(f"margin of {patches}", view.block, values, 0.0)


def _margin(view: BlockView) -> Tensor | None:
    """(B, N) cosine with the own class, less the mean of the others."""
    if view.labels is None or view.num_classes < 2:
        return None
    labels = view.labels.to(view.relevance.device).long()
    own = view.relevance.take_along_dim(labels[:, None, None], 1)[:, 0]
    others = (view.relevance.sum(1) - own) / (view.num_classes - 1)
    return own - others
