"""Received mass: how much of all attention the patches that receive most of it get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass(frozen=True)
class ReceivedMass:
    """Attention that the n patches which receive most get, as a mean over heads.

    Once as the part of all attention, ``Σ c_j`` over the n largest ``c_j = (1/L) Σ_i A_ij`` of a
    head (chance n/L), and once as their share of what all patches get (chance n/N). Columns, the
    sinks of all queries (arXiv 2410.10781), stand beside the row of the class token, the first
    token of towers that have one, because training can move them apart.

    Args:
        numbers: The n; none is found for one above the number of patches.
    """

    name = "received-mass"

    numbers: tuple[int, ...] = (1, 4)

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        prefix, length = view.num_prefix_tokens, view.hidden.shape[1]
        rows = {"from all tokens": view.received}
        if view.num_class_tokens:
            rows["from the class token"] = view.class_token_row
        for source, row in rows.items():
            patches = row[..., prefix:]  # (B, H, N)
            ranked, total = patches.sort(dim=2, descending=True).values, patches.sum(2)
            for number in self.numbers:
                mass = ranked[..., :number].sum(2)
                if number > patches.shape[2]:
                    mass = mass * float("nan")
                # Where patches get nothing, their share is 0/0: none found.
                share = (mass / total).nanmean(1)
                top = f"top {number} patch" + ("es" if number > 1 else "")
                yield Finding(f"mass of {top} {source}", view.block, mass.mean(1), number / length)
                chance = number / max(patches.shape[2], 1)
                yield Finding(f"share of {top} {source}", view.block, share, chance)
