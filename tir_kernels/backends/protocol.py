"""The contract of a backend, and the values that operators hand to one.

A backend knows nothing of autograd, dispatch or the other backends. It gets validated tensors on
one device, with B, H, L, N, C >= 1: empty inputs are answered before it is asked. Query, key, value
and ``grad_output`` have unit stride in d and any other strides; tokens and class embeddings any.
``optional.py`` lists what a backend may have beside this.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
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

    query: Tensor  # (B, H, L, d)
    key: Tensor  # (B, H, L, d)
    value: Tensor  # (B, H, L, d)
    weights: Tensor | None  # (B, L) float32; None: 1, or derived by the operation itself
    scale: float


class StatisticsInputs(NamedTuple):
    """Queries and keys, with a weight per key, whose attention is to be described."""

    query: Tensor  # (B, H, L, d)
    key: Tensor  # (B, H, L, d)
    weights: Tensor | None  # (B, L) float32; None: 1
    scale: float
    num_prefix_tokens: int  # P, 0 to L; N = L - P


class AttentionStatistics(NamedTuple):
    """Numbers about each head's attention, each (B, H, L) float32: two per key, two per query."""

    received_from_prefix: Tensor  # by the key: the prefix queries' mean attention
    received_from_patches: Tensor  # by the key: the patch queries' mean attention
    entropy: Tensor  # of the query's attention, in nats; 0 where it attends to nothing
    log_sum_exp: Tensor  # of the query's weighted exponentials; -inf where it attends to nothing


class BackwardInputs(NamedTuple):
    """Results of a forward pass of attention, and the gradient of the first."""

    output: Tensor  # (B, H, L, d)
    log_sum_exp: Tensor  # (B, H, L)
    grad_output: Tensor  # (B, H, L, d)
    needs_weights_grad: bool


Pair = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of query, key, value and weights


class Backend(Protocol):
    """The operations that every backend has."""

    name: str
    max_head_dim: int | None  # widest heads it takes; None: any
    dtypes: tuple[torch.dtype, ...]  # of queries, tokens and rows

    def unavailable(self) -> str:
        """The reason that it runs on no device here, and the way out; empty if it runs."""

    def refusal(self, device: torch.device) -> str:
        """The reason that it takes no tensors on this very device; empty if it does."""

    def relevance(self, inputs: RelevanceInputs) -> Tensor:
        """Relevance (B, C, N) float32."""

    def token_weights(self, inputs: RelevanceInputs, table: Tensor, top_k: int) -> Pair:
        """Weights (B, L) and counts (B, N) int32; (C + 1,) float32 table, 0 <= top_k <= N."""

    def attention_forward(self, inputs: AttentionInputs) -> Pair:
        """Output, contiguous, in the type of the query, and log_sum_exp (B, H, L) float32: the log
        of the weighted sum of exponentials, -inf for rows that attend to nothing."""

    def attention_backward(self, inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
        """Gradients in the type of the query; the weights', (B, L) float32, has shape (0,) unless
        it is needed."""

    def attention_statistics(self, inputs: StatisticsInputs) -> AttentionStatistics:
        """Contiguous statistics. A mean over no queries is 0, and so is what a key of weight 0 or
        less receives, whatever the queries hold; a query that attends to nothing gives 0."""
