"""Sink ratio: how often a token receives more than a share ε of all attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tir_kernels.analysis.measures.protocol import BlockView, Finding
from tir_kernels.towers.attention import attention_matrix


@dataclass(frozen=True)
class SinkRatio:
    """Share of the heads in which some patch, or the class token, is an attention sink.

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
        received = attention_received(view)
        length = received.shape[2]
        groups = {"patches": received[..., view.num_prefix_tokens :]}
        if view.num_prefix_tokens:
            groups["class token"] = received[..., :1]
        for group, own in groups.items():
            if own.shape[2] == 0:
                continue
            most = own.amax(2)  # (B, H)
            for label, epsilon in (
                (f"{self.epsilon:g}", self.epsilon),
                (f"{self.times_chance:g}/L", self.times_chance / length),
            ):
                ratio = (most > epsilon).float().mean(1)
                name = f"sink ratio of {group}, ε = {label}"
                yield Finding(name, view.block, ratio, float(1 / length > epsilon))


def attention_received(view: BlockView) -> Tensor:
    """(B, H, L) mean over all queries of the attention that each key receives."""
    return attention_matrix(view.call).mean(2)
