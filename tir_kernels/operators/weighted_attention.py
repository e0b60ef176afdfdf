"""Weighted attention: softmax attention in which every key has a weight, or none has."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from tir_kernels.backends.common import (
    are_packed,
    empty_gradients,
    empty_result,
    result_strides,
)
from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs
from tir_kernels.backends.optional import AttentionLaunch
from tir_kernels.backends.protocol import Backend, Gradients, Pair
from tir_kernels.operators.checks import (
    check_attention_inputs,
    check_weights,
    refuse_mask_and_dropout,
    require_bool,
    require_head_width,
    require_same_device,
)
from tir_kernels.operators.choose import choose_backend
from tir_kernels.operators.known_calls import (
    KnownCalls,
    key_of,
    requires_gradient,
)
from tir_kernels.operators.library import (
    Operator,
    call_operator,
    define,
    define_fake,
    is_transformed,
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
    if known is None or not known.is_current(q, backend):
        inputs = _checked(q, k, v, weights, is_causal, scale, backend, return_lse)
        results = differentiable_attention(inputs, backend)
        if key is not None and (known := known_attention(inputs, backend)):
            _known_calls.add(key, tensors, known)
    elif requires_gradient(*tensors):
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
    """What is known of a call: the scale that applies, and who serves it."""

    scale: float
    backend: Any
    launch: AttentionLaunch

    def is_current(self, query: Tensor, name: str) -> bool:
        """Whether the name still stands for that backend."""
        return attention_backend(name, query) is self.backend

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
    return KnownAttention(scale, backend, backend.attention_launch(inputs))


_known_calls: KnownCalls[KnownAttention] = KnownCalls()


def differentiable_attention(inputs: AttentionInputs, backend: str) -> Pair:
    """Output, with its gradients, and log-sum-exp on validated inputs; weights of any type."""
    query, key, value, weights, scale, is_causal = inputs
    if weights is not None:
        weights = weights.to(sums_dtype(query))
    return _WeightedAttention.call(query, key, value, weights, scale, is_causal, backend)


def sums_dtype(query: Tensor) -> torch.dtype:
    """The type of softmax, sums and weights beside queries of a type."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


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


def attention_backend(name: str, query: Tensor) -> Backend:
    """The backend that serves attention of these queries."""
    _, _, _, head_dim = query.shape
    return choose_backend(name, "attention_forward", query.device, query.dtype, head_dim)


def attend(inputs: AttentionInputs, name: str) -> Pair:
    """Output and log-sum-exp from the backend of this name."""
    query = inputs.query
    backend = attention_backend(name, query)
    if query.numel() == 0 or inputs.key.numel() == 0:
        output, log_sum_exp = like_outputs(query)
        return output.zero_(), log_sum_exp.fill_(-torch.inf)
    output, log_sum_exp = backend.attention_forward(inputs)
    return laid_out(output, query), log_sum_exp


def attend_backward(inputs: AttentionInputs, backward: BackwardInputs, name: str) -> Gradients:
    """Gradients of query, key, value and weights from the backend of this name."""
    backend = attention_backend(name, inputs.query)
    if inputs.query.numel() == 0 or inputs.key.numel() == 0:
        grads = like_gradients(inputs, backward.needs_weights_grad, backward.is_packed)
        for grad in grads:
            grad.zero_()
        return grads
    grads = backend.attention_backward(inputs, with_unit_stride(backward))
    return laid_out_gradients(grads, inputs, backward.is_packed)


def laid_out(result: Tensor, rows: Tensor) -> Tensor:
    """A backend's result for rows (B, H, L, d), as PyTorch was told that it lies."""
    is_so = result.stride() == result_strides(rows)
    return result if is_so else empty_result(rows).copy_(result)


def laid_out_gradients(grads: Gradients, inputs: AttentionInputs, is_packed: bool) -> Gradients:
    """A backend's gradients, as PyTorch was told that they lie."""
    grad_query, grad_key, grad_value, grad_weights = grads
    if not is_packed:
        query, key, value = inputs[:3]
        grad_query, grad_key = laid_out(grad_query, query), laid_out(grad_key, key)
        return grad_query, grad_key, laid_out(grad_value, value), grad_weights
    if are_packed(grad_query, grad_key, grad_value):
        return grads
    packed = empty_gradients(inputs, is_packed)
    for one, other in zip(packed, grads[:3], strict=True):
        one.copy_(other)
    return (*packed, grad_weights)


def with_unit_stride(backward: BackwardInputs) -> BackwardInputs:
    """The same with a ``grad_output`` whose channels lie side by side."""
    grad_output = backward.grad_output
    if grad_output.stride(3) == 1:
        return backward
    return backward._replace(grad_output=grad_output.contiguous())


def like_outputs(query: Tensor) -> Pair:
    """Output and log-sum-exp as yet unwritten."""
    log_sum_exp = query.new_empty(query.shape[:3], dtype=sums_dtype(query))
    return empty_result(query), log_sum_exp


def like_gradients(inputs: AttentionInputs, needs_weights_grad: bool, is_packed: bool) -> Gradients:
    """Gradients of query, key, value and weights as yet unwritten."""
    query, key, weights = inputs.query, inputs.key, inputs.weights
    shape = (key.shape[0], key.shape[2]) if needs_weights_grad else (0,)
    dtype = sums_dtype(query) if weights is None else weights.dtype
    return (*empty_gradients(inputs, is_packed), query.new_empty(shape, dtype=dtype))


def lie_packed(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether gradients are to be slices of one tensor, as query, key and value are.

    Results that share memory are not for what traces operators, or wraps their tensors.
    """
    if is_transformed():
        return False
    return type(query) is type(key) is type(value) is Tensor and are_packed(query, key, value)


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
def _weighted_attention_backward(grad_output: Tensor, *rest: Any) -> Gradients:
    query, key, value, weights, output, log_sum_exp, scale, is_causal, *others = rest
    needs_weights_grad, is_packed, name = others
    inputs = AttentionInputs(query, key, value, weights, scale, is_causal)
    backward = BackwardInputs(output, log_sum_exp, grad_output, needs_weights_grad, is_packed)
    return attend_backward(inputs, backward, name)


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
        options = needs_weights_grad, lie_packed(*saved[:3]), ctx.backend
        *grads, grad_weights = call_operator(
            "weighted_attention_backward", grad_output, *saved, ctx.scale, ctx.is_causal, *options
        )
        return (*grads, grad_weights if needs_weights_grad else None, None, None, None)
