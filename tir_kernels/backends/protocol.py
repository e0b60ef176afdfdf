"""The contract of a backend, and the values that one gives back.

A backend knows nothing of autograd, dispatch or the other backends. It gets validated tensors on
one device, with B, H, Lq, L, N, C >= 1: empty inputs are answered before it is asked. ``inputs.py``
says what they are, and ``optional.py`` what a backend may have beside this.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .inputs import AttentionInputs, BackwardInputs, RelevanceInputs, StatisticsInputs


class AttentionStatistics(NamedTuple):
    """Float32 numbers about each head: by the key (B, H, L), by the query (B, H, Lq)."""

    received_from_prefix: Tensor  # by the key: the prefix queries' mean attention
    received_from_patches: Tensor  # by the key: the patch queries' mean attention
    entropy: Tensor  # of the query's attention, in nats; 0 where it attends to nothing
    log_sum_exp: Tensor  # of the query's weighted exponentials; -inf where it attends to nothing


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
        """Output in the type of the query, and log_sum_exp (B, H, Lq) float32: the log of the
        weighted sum of exponentials, -inf for rows that attend to nothing.

        An output that does not lie as ``common.empty_result`` of the query does is copied.
        """

    def attention_backward(self, inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
        """Gradients in the type of the query; the weights', (B, L) float32, has shape (0,) unless
        it is needed. Those that do not lie as ``common.empty_gradients`` do are copied.
        """

    def attention_statistics(self, inputs: StatisticsInputs) -> AttentionStatistics:
        """Contiguous statistics. A mean over no queries is 0, and so is what a key of weight 0 or
        less receives, whatever the queries hold; a query that attends to nothing gives 0."""
