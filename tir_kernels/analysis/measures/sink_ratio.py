"""Sink ratio: how often a token receives more than a share ε of all attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass(frozen=True)
class SinkRatio:
    """Share of the heads in which some patch, the class token, or some register is a sink.

    A token j is a sink of a head if its attention received, ``c_j = (1/L) Σ_i A_ij`` over all L
    queries, exceeds ε (arXiv 2410.10781, there with causal attention). Under uniform attention
    every ``c_j`` is 1/L.

    Args:
        epsilon: ε of the absolute ratio.
        times_chance: ε of the relative ratio, as a multiple of 1/L.
    """

    name = "sink-ratio"

    epsilon: float = 0.3
    times_chance: float = 10.0

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        length = view.received.shape[2]
        for group, part in view.token_groups.items():
            most = view.received[..., part].amax(2)  # (B, H)
            for label, epsilon in (
                (f"{self.epsilon:g}", self.epsilon),
                (f"{self.times_chance:g}/L", self.times_chance / length),
            ):
                ratio = (most > epsilon).float().mean(1)
                name = f"sink ratio of {group}, ε = {label}"
                yield Finding(name, view.block, ratio, float(1 / length > epsilon))
