"""Attention in numbers per key and per query, from an attention call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tir_kernels.towers.attention import attention_matrix
from tir_kernels.towers.protocol import AttentionCall


class AttentionStatistics(NamedTuple):
    """Attention received per key and entropy per query, all (B, H, L) float32."""

    received_from_prefix: Tensor  # mean over prefix queries; 0 where there are none
    received_from_patches: Tensor  # mean over patch queries
    entropy: Tensor  # of each query's row, in nats


def statistics_of(call: AttentionCall, num_prefix_tokens: int) -> AttentionStatistics:
    """The statistics of a call whose key weights, if any, are a tensor."""
    matrix = attention_matrix(call)
    prefix, patches = matrix[:, :, :num_prefix_tokens], matrix[:, :, num_prefix_tokens:]
    return AttentionStatistics(
        prefix.sum(2) / max(prefix.shape[2], 1),
        patches.sum(2) / max(patches.shape[2], 1),
        -matrix.xlogy(matrix).sum(3),
    )
