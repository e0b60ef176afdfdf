"""Weighted attention: softmax attention in which every key has a weight, or none has."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, is_grad_enabled

from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs
from tir_kernels.backends.optional import AttentionLaunch, BackwardLaunch
from tir_kernels.backends.protocol import Gradients, Pair
from tir_kernels.operators.attending import (
    attend,
    attend_backward,
    attention_backend,
    attention_gradients,
    lie_packed,
    like_gradients,
    like_outputs,
    sums_dtype,
)
from tir_kernels.operators.checks import (
    check_attention_inputs,
    check_weights,
    refuse_mask_and_dropout,
    require_bool,
    require_head_width,
    require_same_device,
)
from tir_kernels.operators.known_calls import KnownCalls, key_of
from tir_kernels.operators.library import (
    Operator,
    define,
    define_fake,
)
from tir_kernels.operators.second_derivative import differentiable_once
from tir_kernels.precision import autocast_dtype

WAY_OUT = (
    "write this attention in plain PyTorch to differentiate its gradient, for a penalty on it say"
)


@overload
def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
) -> Tensor: ...


@overload
def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
    attn_mask: None = None,
    dropout_p: float = 0.0,
) -> Pair: ...


def weighted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    attn_mask: None = None,
    dropout_p: float = 0.0,
) -> Tensor | Pair:
    """Softmax attention in which key j counts w[j] times: placement "attention".

    ``A[i, j] = w[j] exp(s[i, j]) / sum_j w[j] exp(s[i, j])`` with ``s = scale q . k``. Weights
    below 0 act as 0, and a key of weight 0 is not attended to, exactly. Where all weights of an
    image are 0 the output and every gradient are 0.

    Args:
        q: (B, H, Lq, d), with unit stride in d and any other strides, so that slices of a packed
            (B, L, 3, H, d) projection cost no copy. Lq may differ from L: one query for a class
            token or a pool, say.
        k, v: (B, H, L, d) of the dtype of q, with strides as free.
        weights: (B, L), finite; computed with in float32. GPU kernels take those below 2^-126,
            which are not normal numbers, for 0. ``None``: plain attention, to the bit the same as
            with weights of 1.
        is_causal: Whether query i attends to the keys j <= i alone, counted from the first of both,
            as in PyTorch's ``scaled_dot_product_attention``. As there, NaN in a later key or value
            may reach the result.
        scale: ``None`` means ``d ** -0.5``.
        backend: "auto", or a name of :func:`available_backends`.
        return_lse: Also return ``ln sum_j w[j] exp(s[i, j])``, which is -inf for a query that
            attends to nothing.
        attn_mask, dropout_p: So that calls of PyTorch's attention fit as they are; a mask and
            dropout are refused.

    Returns:
        (B, H, Lq, d) in the dtype of q, or in autocast's. Gradients flow to q, k, v and weights:
        that of a weight of 0 is its one-sided limit, that of a negative weight is 0. On a GPU the
        gradient of a weight of less than 2^-126 of the image's largest may be 0. A second
        derivative is an error; ``torch.compile(backend="eager")`` alone, which loses that of any
        ``autograd.Function``, makes it 0. With ``return_lse`` a pair of it and the log-sum-exp,
        (B, H, Lq) float32 (float64 where q is), which has no gradient.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device or stride.
        RuntimeError: A backend that cannot run here.
    """
    if attn_mask is not None or dropout_p:
        refuse_mask_and_dropout(attn_mask, dropout_p)
    tensors = (q, k, v, weights)
    key = key_of(tensors, is_causal, scale, backend, return_lse)
    known = _known_calls.get(key, tensors)
    if known is None:
        inputs = _checked(q, k, v, weights, is_causal, scale, backend, return_lse)
        results = differentiable_attention(inputs, backend)
        if key is not None and (known := known_attention(inputs, backend)):
            _known_calls.add(key, tensors, known)
    elif known.learns and is_grad_enabled():
        options = known.scale, is_causal, backend
        results = _WeightedAttention.call_by(known.serve, q, k, v, weights, *options)
    else:
        results = known.launch(q, k, v, weights)
    return results if return_lse else results[0]


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    is_causal: bool,
    scale: float | None,
    backend: str,
    return_lse: bool,
) -> AttentionInputs:
    """The arguments of :func:`weighted_attention` as inputs, or an error about one of them."""
    q, k, v = cast_for_autocast(q, k, v)
    scale = check_attention_inputs(q, {"k": k, "v": v}, scale, backend)
    require_bool("is_causal", is_causal)
    if weights is not None:
        check_weights(weights, k.shape[0], k.shape[2], "k")
        require_same_device("weights", weights, "q", q)
    if return_lse:
        require_head_width(q)
    return AttentionInputs(q, k, v, weights, scale, is_causal)


class KnownAttention(NamedTuple):
    """What is known of a call: the scale that applies, who serves it, and whether a tensor of it
    requires a gradient.
    """

    scale: float
    backend: Any
    launch: AttentionLaunch
    learns: bool

    def serve(self, *inputs: Any) -> Pair:
        """The operator, of inputs like these."""
        return self.launch(*inputs[:4])


def known_attention(inputs: AttentionInputs, name: str) -> KnownAttention | None:
    """What is to be remembered of validated inputs, if anything is."""
    query, key, _, weights, scale, _ = inputs
    is_simple = weights is None or (weights.dtype == torch.float32 and weights.is_contiguous())
    if query.numel() == 0 or key.numel() == 0 or not is_simple:
        return None
    backend: Any = attention_backend(name, query)
    if not hasattr(backend, "attention_launch"):
        return None
    learns = any(each is not None and each.requires_grad for each in inputs[:4])
    return KnownAttention(scale, backend, backend.attention_launch(inputs), learns)


_known_calls: KnownCalls[KnownAttention] = KnownCalls()


def differentiable_attention(inputs: AttentionInputs, backend: str) -> Pair:
    """Output, with its gradients, and log-sum-exp on validated inputs; weights of any type."""
    query, key, value, weights, scale, is_causal = inputs
    if weights is not None:
        weights = weights.to(sums_dtype(query))
    return _WeightedAttention.call(query, key, value, weights, scale, is_causal, backend)


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
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


@define(
    "weighted_attention(Tensor query, Tensor key, Tensor value, Tensor? weights, float scale, "
    "bool is_causal, str backend) -> (Tensor output, Tensor log_sum_exp)"
)
def _weighted_attention(*arguments: Any) -> Pair:
    *fields, name = arguments
    return attend(AttentionInputs(*fields), name)


@define_fake("weighted_attention")
def _(query: Tensor, *rest: Any) -> Pair:
    return like_outputs(query)


@define(
    "weighted_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor? weights, Tensor output, Tensor log_sum_exp, float scale, bool is_causal, "
    "bool needs_weights_grad, bool is_packed, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weights)"
)
def _weighted_attention_backward(*arguments: Any) -> Gradients:
    return attend_backward(*_backward_inputs(*arguments[:-1]), arguments[-1])


def _backward_inputs(grad_output: Tensor, *rest: Any) -> tuple[AttentionInputs, BackwardInputs]:
    """The operator's arguments but for the backend's name."""
    query, key, value, weights, output, log_sum_exp, scale, is_causal, *options = rest
    inputs = AttentionInputs(query, key, value, weights, scale, is_causal)
    return inputs, BackwardInputs(output, log_sum_exp, grad_output, *options)


def _backward_launch(backend: Any, arguments: tuple) -> BackwardLaunch:
    return backend.backward_launch(*_backward_inputs(*arguments))


@define_fake("weighted_attention_backward")
def _(grad_output: Tensor, *rest: Any) -> Gradients:
    query, key, value, weights, _, _, scale, is_causal, needs_weights_grad, is_packed, _ = rest
    inputs = AttentionInputs(query, key, value, weights, scale, is_causal)
    return like_gradients(inputs, needs_weights_grad, is_packed)


class _WeightedAttention(Operator):
    """Softmax attention whose keys carry weights; gradients for query, key, value and weights."""

    operator = "weighted_attention"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Pair) -> None:
        query, key, value, weights, ctx.scale, ctx.is_causal, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, weights, *output)

    @staticmethod
    @differentiable_once(WAY_OUT)
    def backward(ctx: Any, saved: tuple, grad_output: Tensor, grad_log_sum_exp: None) -> tuple:
        needs_weights_grad = ctx.needs_input_grad[3]
        options = ctx.scale, ctx.is_causal, needs_weights_grad, lie_packed(*saved[:3]), ctx.backend
        *grads, grad_weights = attention_gradients(
            "weighted_attention_backward", (grad_output, *saved), options, _backward_launch
        )
        return (*grads, grad_weights if needs_weights_grad else None, None, None, None)
