"""The operations that a backend may have beside those of the protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from .inputs import AttentionInputs, BackwardInputs, RelevanceInputs
from .protocol import Gradients, Pair

AttentionLaunch = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Pair]
# Of grad_output, query, key, value, weights, output, log_sum_exp
BackwardLaunch = Callable[..., Gradients]
# Of tokens, class embeddings, weight and bias of the norm, projection, table
SelectionLaunch = Callable[..., Pair]


class DropoutInputs(NamedTuple):
    """Rows, and what decides which of their channels are kept."""

    rows: Tensor  # (G, S, T, D), contiguous
    seeds: Tensor  # (G,) int64
    step: Tensor  # (1,) int64
    stream: int
    first_branch: int
    threshold: int  # a channel is kept where 16 random bits are at least this
    scale: float  # of what is kept


class OptionalOperations(Protocol):
    """The operations that a backend may have, by name; "auto" passes over one that lacks them.

    Without ``reweighted_forward`` and ``reweighted_backward``, the operator puts token weights and
    weighted attention together.
    """

    def attention_launch(self, inputs: AttentionInputs) -> AttentionLaunch:
        """What does :meth:`Backend.attention_forward` for query, key, value and contiguous weights
        of the same shapes, strides and types as these, which it does not hold.

        Host time of small calls: sizes are looked up and laid out once.
        """

    def backward_launch(self, inputs: AttentionInputs, backward: BackwardInputs) -> BackwardLaunch:
        """The same for :meth:`Backend.attention_backward`, of rows that all have unit stride in d
        and a contiguous log_sum_exp.
        """

    def selection_launch(self, inputs: RelevanceInputs, top_k: int) -> SelectionLaunch:
        """The same for :meth:`Backend.token_weights`, of inputs that it :meth:`takes`."""

    def takes(self, inputs: RelevanceInputs, table: Tensor) -> bool:
        """Whether none of the tensors would have to be converted or copied."""

    def weights_of_counts(self, counts: Tensor, table: Tensor, num_prefix_tokens: int) -> Tensor:
        """The weights (B, L) of tokens that were counted before."""

    def reweighted_forward(
        self, attention: AttentionInputs, relevance: RelevanceInputs, table: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, log_sum_exp and counts of attention that looks weights up by itself."""

    def reweighted_backward(
        self, inputs: AttentionInputs, backward: BackwardInputs, counts: Tensor, table: Tensor
    ) -> Gradients:
        """Gradients as :meth:`Backend.attention_backward` gives them."""

    def philox_dropout(self, inputs: DropoutInputs, output: Tensor) -> None:
        """Fill ``output`` (G, K, S, T, D); ``csrc/include/tir/adapters.h`` says how."""

    def dropped_product(self, inputs: DropoutInputs, factor: Tensor, output: Tensor) -> bool:
        """Fill ``output`` (G, K, S T, R) with dropped rows times (G, K, R, D), if it takes this R.

        All are contiguous and of one type. ``philox_dropout`` and a product do the same.
        """

    def factor_gradient(self, inputs: DropoutInputs, grad: Tensor, output: Tensor) -> bool:
        """Fill ``output`` (G, K, R, D) with the gradient of the factor from (G, K, S T, R)."""

    def bias_activation(
        self, hidden: Tensor, bias: Tensor | None, kind: str, grad_output: Tensor | None
    ) -> Tensor:
        """The activation, or the gradient of ``hidden`` where there is one of the output."""

    def add_norm(
        self,
        hidden: Tensor,
        change: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        total: Tensor,
        normed: Tensor,
    ) -> None:
        """Fill ``total``, if there is a change, and ``normed``; all rows are contiguous."""

    def add_norm_backward(
        self,
        total: Tensor,
        weight: Tensor,
        grad_total: Tensor | None,
        grad_normed: Tensor,
        eps: float,
        grad_hidden: Tensor,
        grad_change: Tensor,
    ) -> None:
        """Fill the gradients; that of the change has shape (0,) where it is of the same type."""

    def description(self) -> str:
        """A few words on what it runs with here, for a report; or nothing."""
