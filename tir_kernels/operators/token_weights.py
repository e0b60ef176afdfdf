"""Token weights: how many classes select a patch token, and the weight that a table gives it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tir_kernels.backends.inputs import RelevanceInputs
from tir_kernels.operators.checks import (
    check_relevance_inputs,
    check_weights,
    require_same_device,
    require_tensor,
    resolve_table,
)
from tir_kernels.operators.library import Operator, define, define_fake
from tir_kernels.operators.relevance import RELEVANCE_ARGUMENTS, is_empty, relevance_backend
from tir_kernels.rules import JointSpace, WeightRule

DEFAULT_RULE = WeightRule()

# In schemas: what is taken apart as a Selection.
SELECTION_ARGUMENTS = f"{RELEVANCE_ARGUMENTS}, Tensor table, float top_ratio, int num_prefix_tokens"


class TokenWeights(NamedTuple):
    """Weights (B, L) float32 of all tokens, and counts (B, N) int32 of the patch tokens."""

    weights: Tensor
    counts: Tensor


def token_weights(
    tokens: Tensor,
    class_embeddings: Tensor,
    *,
    joint_space: JointSpace | None = None,
    rule: WeightRule = DEFAULT_RULE,
    table: Tensor | None = None,
    num_prefix_tokens: int = 1,
    backend: str = "auto",
) -> TokenWeights:
    """Count how many classes select each patch token, and look up its weight.

    Each class selects its ``int(N * rule.top_ratio)`` patch tokens of highest relevance; ties go to
    the lower index and NaN ranks last. ``weight = table[count]``; prefix tokens have weight 1.

    Args:
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend: As for
            :func:`token_relevance`.
        rule: The selection ratio, and the table where none is given.
        table: (C + 1,) floats of the caller's own; it may require gradients.

    Returns:
        ``TokenWeights(weights, counts)``: (B, L) float32 and (B, N) int32. Gradients flow to the
        table alone.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device, group count or table length.
        RuntimeError: A backend that cannot run here.
    """
    inputs = check_relevance_inputs(
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend
    )
    table = resolve_table(rule, table, inputs)
    return differentiable_weights(inputs, table, rule, backend)


def reweight_tokens(tokens: Tensor, weights: Tensor) -> Tensor:
    """Scale every token: placement "tokens", which is the published method.

    Args:
        tokens: (B, L, D).
        weights: (B, L), any sign.

    Returns:
        (B, L, D) in the dtype of the tokens. Gradients flow to both.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype or device.
    """
    require_tensor("tokens", tokens, "(B, L, D)")
    check_weights(weights, tokens.shape[0], tokens.shape[1], "tokens")
    require_same_device("weights", weights, "tokens", tokens)
    return (tokens * weights.unsqueeze(-1)).to(tokens.dtype)


def differentiable_weights(
    inputs: RelevanceInputs, table: Tensor, rule: WeightRule, backend: str
) -> TokenWeights:
    """The operator on validated inputs, with the table's gradient."""
    return TokenWeights(*_TokenWeights.call(*selection_arguments(inputs, table, rule), backend))


def selection_arguments(inputs: RelevanceInputs, table: Tensor, rule: WeightRule) -> tuple:
    """The arguments of a schema from the tokens to the number of prefix tokens."""
    # The ratio is a constant of a compiled graph, as no attribute is.
    return (*inputs[:6], table, float(rule.top_ratio), inputs.num_prefix_tokens)


class Selection(NamedTuple):
    """Relevance's inputs, and how they become weights."""

    inputs: RelevanceInputs
    table: Tensor
    top_k: int

    @classmethod
    def of(cls, arguments: tuple) -> Selection:
        """The arguments of a schema from the tokens to the number of prefix tokens, by name."""
        *fields, table, top_ratio, num_prefix_tokens = arguments
        inputs = RelevanceInputs._make((*fields, num_prefix_tokens))
        num_patches = inputs.tokens.shape[1] - num_prefix_tokens
        return cls(inputs, table, int(num_patches * top_ratio))


def weigh(selection: Selection, name: str) -> tuple[Tensor, Tensor]:
    """Weights (B, L) and counts (B, N) from the backend of this name."""
    inputs, table, top_k = selection
    backend = relevance_backend(name, "token_weights", inputs, table)
    if is_empty(inputs):
        weights, counts = _like_weights(inputs.tokens, table, inputs.num_prefix_tokens)
        return weights.fill_(1.0), counts
    return backend.token_weights(inputs, table, top_k)


@define(f"token_weights({SELECTION_ARGUMENTS}, str backend) -> (Tensor weights, Tensor counts)")
def _token_weights(*arguments: Any) -> tuple[Tensor, Tensor]:
    return weigh(Selection.of(arguments[:-1]), arguments[-1])


@define_fake("token_weights")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    tokens, *_, table, _, num_prefix_tokens, _ = arguments
    return _like_weights(tokens, table, num_prefix_tokens)


def _like_weights(tokens: Tensor, table: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    batch, length, _ = tokens.shape
    weights = tokens.new_empty((batch, length), dtype=table.dtype)
    return weights, tokens.new_empty((batch, length - num_prefix_tokens), dtype=torch.int32)


def table_gradient(grad_weights: Tensor, counts: Tensor, table: Tensor) -> Tensor:
    """Sum the gradients of the weights, (B, L), by the count, (B, N), that gave the weight.

    A masked sum per table entry rather than a scatter, whose order of additions is not fixed on a
    GPU.
    """
    num_prefix_tokens = grad_weights.shape[1] - counts.shape[1]
    grads = grad_weights[:, num_prefix_tokens:].reshape(1, -1)
    entries = torch.arange(table.shape[0], device=counts.device, dtype=counts.dtype)
    return torch.where(counts.reshape(1, -1) == entries[:, None], grads, 0.0).sum(1).to(table.dtype)


class _TokenWeights(Operator):
    """Weights and counts from tokens; only the table, the seventh input, receives a gradient."""

    operator = "token_weights"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _, counts = output
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(inputs[6], counts)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor, grad_counts: None) -> tuple:
        table, counts = ctx.saved_tensors  # linear in both: differentiable as often as one likes
        grad_table = None
        if ctx.needs_input_grad[6]:
            grad_table = table_gradient(grad_weights, counts, table)
        return (None,) * 6 + (grad_table, None, None, None)
