"""Attention by a backend: who serves it, and results that lie as PyTorch was told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tir_kernels.backends.common import are_packed, empty_gradients, empty_result, result_strides
from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs
from tir_kernels.backends.optional import BackwardLaunch
from tir_kernels.backends.protocol import Backend, Gradients, Pair
from tir_kernels.operators.choose import choose_backend
from tir_kernels.operators.known_calls import KnownCalls, key_of
from tir_kernels.operators.library import call_operator, is_transformed


def sums_dtype(query: Tensor) -> torch.dtype:
    """The type of softmax, sums and weights beside queries of a type."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


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


_known_gradients: KnownCalls[BackwardLaunch] = KnownCalls()


def attention_gradients(
    operator: str,
    tensors: tuple[Tensor | None, ...],
    options: tuple,
    launch_for: Callable[[Any, tuple], BackwardLaunch],
) -> Gradients:
    """What an operator of gradients gives; calls like one before go straight to their launch.

    Args:
        operator: Its name.
        tensors: Its first arguments: grad_output, query and so on, output and log-sum-exp at last.
        options: Its other arguments, the backend's name at last.
        launch_for: What a backend launches for arguments like these, the name left out.
    """
    *others, name = options
    key = key_of(tensors, operator, *options)
    launch = _known_gradients.get(key, tensors)
    if launch is not None:
        return launch(*tensors)
    gradients = call_operator(operator, *tensors, *options)
    if key is not None and _lie_well(tensors):
        query: Any = tensors[1]
        backend: Any = attention_backend(name, query)
        if hasattr(backend, "backward_launch"):
            _known_gradients.add(key, tensors, launch_for(backend, (*tensors, *others)))
    return gradients


def _lie_well(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether no tensor of a backward pass is empty, or would have to be copied."""
    grad_output, query, key, value, *others, output, log_sum_exp = tensors
    rows = (grad_output, query, key, value, output)
    return (
        all(each is not None and each.numel() > 0 and each.stride(-1) == 1 for each in rows)
        and all(each is None or each.is_contiguous() for each in (*others, log_sum_exp))
    )  # fmt: skip


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
