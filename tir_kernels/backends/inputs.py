"""The values that operators hand to a backend.

Query, key, value and ``grad_output`` have unit stride in d and any other strides; tokens and class
embeddings have any strides.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RelevanceInputs(NamedTuple):
    """Patch tokens, classes, and the map from the ones to the others' space."""

    tokens: Tensor  # (B, L, D)
    class_embeddings: Tensor  # (G, C, E)
    norm_weight: Tensor | None  # (D,), or None for 1
    norm_bias: Tensor | None  # (D,), or None for 0
    norm_eps: float | None  # None: no LayerNorm
    proj: Tensor | None  # (D, E), or None: E = D
    num_prefix_tokens: int  # P; N = L - P


class AttentionInputs(NamedTuple):
    """Queries, keys and values, with a weight per key."""

    query: Tensor  # (B, H, Lq, d)
    key: Tensor  # (B, H, L, d)
    value: Tensor  # (B, H, L, d)
    weights: Tensor | None  # (B, L) float32; None: 1, or derived by the operation itself
    scale: float
    is_causal: bool = False  # query i attends to the keys j <= i alone


class StatisticsInputs(NamedTuple):
    """Queries and keys, with a weight per key, whose attention is to be described."""

    query: Tensor  # (B, H, Lq, d)
    key: Tensor  # (B, H, L, d)
    weights: Tensor | None  # (B, L) float32; None: 1
    scale: float
    num_prefix_tokens: int  # P of the queries, 0 to Lq
    is_causal: bool = False  # query i attends to the keys j <= i alone


class BackwardInputs(NamedTuple):
    """Results of a forward pass of attention, and the gradient of the first."""

    output: Tensor  # (B, H, Lq, d)
    log_sum_exp: Tensor  # (B, H, Lq)
    grad_output: Tensor  # (B, H, Lq, d)
    needs_weights_grad: bool
    is_packed: bool = False  # gradients of query, key and value are slices of (B, L, 3, H, d)
