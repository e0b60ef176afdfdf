"""The public functions: they validate, then call the operators.

The formulas are those of dynamic token re-weighting for few-shot fine-tuning of CLIP-like vision
transformers (arXiv 2605.25799). B images, H heads, L tokens of which P are prefix tokens and
N = L - P patch tokens, d head width, D model width, E joint width, C classes, G class groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tir_kernels.operators import ops  # noqa: F401  (registers the operators)
from tir_kernels.operators.autograd import (
    ReweightedAttention,
    TokenWeightsFunction,
    WeightedAttention,
)
from tir_kernels.operators.checks import (
    check_attention_inputs,
    check_relevance_inputs,
    check_weights,
    require_same_device,
    require_tensor,
    resolve_table,
)
from tir_kernels.precision import autocast_dtype
from tir_kernels.rules import JointSpace, WeightRule

_DEFAULT_RULE = WeightRule()


class TokenWeights(NamedTuple):
    """Weights (B, L) float32 of all tokens, and counts (B, N) int32 of the patch tokens."""

    weights: Tensor
    counts: Tensor


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
    class_embeddings, space, num_prefix_tokens = check_relevance_inputs(
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend
    )
    with torch.no_grad():
        return torch.ops.tir_kernels.token_relevance(
            tokens,
            class_embeddings,
            space.norm_weight,
            space.norm_bias,
            space.norm_eps,
            space.proj,
            num_prefix_tokens,
            backend,
        )


def token_weights(
    tokens: Tensor,
    class_embeddings: Tensor,
    *,
    joint_space: JointSpace | None = None,
    rule: WeightRule = _DEFAULT_RULE,
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
    class_embeddings, space, num_prefix_tokens = check_relevance_inputs(
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend
    )
    table = resolve_table(rule, table, tokens, class_embeddings.shape[1])
    weights, counts = TokenWeightsFunction.call(
        tokens.detach(),
        class_embeddings.detach(),
        *_joint_space_parts(space),
        table,
        float(rule.top_ratio),  # a constant of a compiled graph, as no attribute is
        num_prefix_tokens,
        backend,
    )
    return TokenWeights(weights, counts)


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


def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which key j counts w[j] times: placement "attention".

    ``A[i, j] = w[j] exp(s[i, j]) / sum_j w[j] exp(s[i, j])`` with ``s = scale q . k``. Weights
    below 0 act as 0, and a key of weight 0 is not attended to, exactly. Where all weights of an
    image are 0 the output and every gradient are 0.

    Args:
        q, k, v: (B, H, L, d) of one dtype, with unit stride in d and any other strides, so that
            slices of a packed (B, L, 3, H, d) projection cost no copy.
        weights: (B, L), finite; computed with in float32. GPU kernels take those below 2^-126,
            which are not normal numbers, for 0.
        scale: ``None`` means ``d ** -0.5``.
        backend: "auto", or a name of :func:`available_backends`.

    Returns:
        (B, H, L, d) in the dtype of q, or in autocast's. Gradients flow to q, k, v and the weights:
        that of a weight of 0 is its one-sided limit, that of a negative weight is 0. On a GPU the
        gradient of a weight of less than 2^-126 of the image's largest may be 0. A second
        derivative is an error; ``torch.compile(backend="eager")`` alone, which loses that of any
        ``autograd.Function``, makes it 0.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device or stride.
        RuntimeError: A backend that cannot run here.
    """
    q, k, v = _autocast(q, k, v)
    scale = check_attention_inputs(q, k, v, scale, backend)
    check_weights(weights, q.shape[0], q.shape[2], "q")
    require_same_device("weights", weights, "q", q)
    weights = weights.to(_weights_dtype(q))
    return WeightedAttention.call(q, k, v, weights, scale, backend)[0]


def reweighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    class_embeddings: Tensor,
    *,
    joint_space: JointSpace | None = None,
    rule: WeightRule = _DEFAULT_RULE,
    table: Tensor | None = None,
    num_prefix_tokens: int = 1,
    scale: float | None = None,
    backend: str = "auto",
    return_weights: bool = False,
    return_counts: bool = False,
) -> Tensor | tuple[Tensor, TokenWeights] | tuple[Tensor, Tensor]:
    """:func:`token_weights` of the tokens, and :func:`weighted_attention` with them.

    Args:
        q, k, v, scale: As for :func:`weighted_attention`; (B, H, L, d).
        tokens: (B, L, D), what entered the block.
        class_embeddings, joint_space, rule, table, num_prefix_tokens, backend: As for
            :func:`token_weights`.
        return_weights: Also return the ``TokenWeights``.
        return_counts: Also return their counts alone, for which no weights are written.

    Returns:
        (B, H, L, d) in the dtype of q, or in autocast's; with ``return_weights`` a pair of it and
        the ``TokenWeights``, else with ``return_counts`` one of it and the counts, (B, N) int32.
        Gradients flow to q, k, v and the table.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device, group count or table length.
        RuntimeError: A backend that cannot run here.
    """
    q, k, v = _autocast(q, k, v)
    scale = check_attention_inputs(q, k, v, scale, backend)
    class_embeddings, space, num_prefix_tokens = check_relevance_inputs(
        tokens, class_embeddings, joint_space, num_prefix_tokens, backend
    )
    require_same_device("tokens", tokens, "q", q)
    if tokens.shape[:2] != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"tokens must have the batch and length of q, ({q.shape[0]}, {q.shape[2]}, D); "
            f"got {tuple(tokens.shape)}"
        )
    if tokens.dtype == torch.float64 and q.dtype != torch.float64:
        raise TypeError(f"tokens are float64 but q is {q.dtype}; pass tokens.float()")
    table = resolve_table(rule, table, tokens, class_embeddings.shape[1])
    relevance_inputs = (
        tokens.detach(),
        class_embeddings.detach(),
        *_joint_space_parts(space),
        table,
        float(rule.top_ratio),  # a constant of a compiled graph, as no attribute is
        num_prefix_tokens,
    )
    if return_weights:
        weights, counts = TokenWeightsFunction.call(*relevance_inputs, backend)
        attention_weights = weights.to(_weights_dtype(q))
        output = WeightedAttention.call(q, k, v, attention_weights, scale, backend)[0]
        return output, TokenWeights(weights, counts)
    output, _, counts = ReweightedAttention.call(q, k, v, *relevance_inputs, scale, backend)
    return (output, counts) if return_counts else output


def _joint_space_parts(
    space: JointSpace,
) -> tuple[Tensor | None, Tensor | None, float | None, Tensor | None]:
    def detached(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach()

    eps = None if space.norm_eps is None else float(space.norm_eps)
    return detached(space.norm_weight), detached(space.norm_bias), eps, detached(space.proj)


def _weights_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as PyTorch's own attention is cast inside an autocast region."""
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    dtype = autocast_dtype(device_type)
    if dtype is None:
        return tensors
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float16, torch.bfloat16)
        else t
        for t in tensors
    )
