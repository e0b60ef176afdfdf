"""Relevance: the cosine of every patch token with every class, in the joint image-text space.

The symbols of all operators (formulas: dynamic token re-weighting, arXiv 2605.25799): B images,
H heads, L tokens of which P are prefix tokens and N = L - P patch tokens, d head width, D model
width, E joint width, C classes, G class groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.backends.inputs import RelevanceInputs
from tir_kernels.backends.protocol import Backend
from tir_kernels.operators.checks import check_relevance_inputs
from tir_kernels.operators.choose import choose_backend
from tir_kernels.operators.library import OPS, define, define_fake
from tir_kernels.rules import JointSpace

# In schemas: RelevanceInputs but for the number of prefix tokens.
RELEVANCE_ARGUMENTS = (
    "Tensor tokens, Tensor class_embeddings, Tensor? norm_weight, Tensor? norm_bias, "
    "float? norm_eps, Tensor? proj"
)


def token_relevance(
    tokens: Tensor,
    class_embeddings: Tensor,
    *,
    joint_space: JointSpace | None = None,
    num_prefix_tokens: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Cosine of every patch token with every class, in the joint image-text space.

    ``f = LayerNorm(tokens[:, P:]) @ proj`` and
    ``relevance[b, c, n] = f[b, n] . t[c] / ((|f[b, n]| + 1e-8) (|t[c]| + 1e-8))``.

    Args:
        tokens: (B, L, D), what enters a vision block.
        class_embeddings: (C, E), or (G, C, E) where G divides B and image b belongs to group
            ``b // (B / G)``.
        joint_space: The tower's final norm and projection; ``None``: the tokens are in the joint
            space already (E = D).
        num_prefix_tokens: P; class token and registers come first and have no relevance.
        backend: "auto", or a name of :func:`available_backends`.

    Returns:
        (B, C, N) float32, without gradient: selection is piecewise constant. Finite tokens and
        classes of any magnitude have one on the backends "reference" and "cpu"; GPU kernels sum
        squares in float32, so tokens, features and classes must have norms below 2^63 there.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device or group count.
        RuntimeError: A backend that cannot run here.
    """
    inputs = check_relevance_inputs(
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend
    )
    return OPS.token_relevance(*inputs, backend)


def relevance_backend(
    name: str, operation: str, inputs: RelevanceInputs, table: Tensor | None = None
) -> Backend:
    """The backend that serves a call on these tensors."""
    tokens, class_embeddings, norm_weight, norm_bias, _, proj, _ = inputs
    tensors = (tokens, class_embeddings, norm_weight, norm_bias, proj, table)
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if is_double else tokens.dtype
    return choose_backend(name, operation, tokens.device, dtype)


def is_empty(inputs: RelevanceInputs) -> bool:
    """Whether there is no patch token at all."""
    batch, length, _ = inputs.tokens.shape
    return batch == 0 or length == inputs.num_prefix_tokens


@define(f"token_relevance({RELEVANCE_ARGUMENTS}, int num_prefix_tokens, str backend) -> Tensor")
def _token_relevance(*arguments: Any) -> Tensor:
    *fields, name = arguments
    inputs = RelevanceInputs(*fields)
    backend = relevance_backend(name, "relevance", inputs)
    return _fake_relevance(*arguments) if is_empty(inputs) else backend.relevance(inputs)


@define_fake("token_relevance")
def _fake_relevance(*arguments: Any) -> Tensor:
    tokens, class_embeddings, *_, num_prefix_tokens, _ = arguments
    batch, length, _ = tokens.shape
    shape = (batch, class_embeddings.shape[-2], length - num_prefix_tokens)
    return tokens.new_empty(shape, dtype=torch.float32)
