"""The operators as PyTorch sees them: schema, shapes for tracing, and the call into a backend.

Inputs were validated by ``tir_kernels.operators.api``. Here "auto" is resolved, so that a compiled
graph picks by the tensors it is run on, and empty inputs are answered, so that no backend needs to
think of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tir_kernels.operators.choose import choose_backend

_LIBRARY = torch.library.Library("tir_kernels", "DEF")


def _define(schema: str):
    """Register the decorated function as the implementation of an operator on every device."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)

    def register(function):
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def _relevance_backend(backend: str, tokens: Tensor, *others: Tensor | None):
    is_double = any(t is not None and t.dtype == torch.float64 for t in (tokens, *others))
    return choose_backend(backend, tokens.device, is_double)


def _attention_backend(backend: str, query: Tensor):
    is_double = query.dtype == torch.float64
    return choose_backend(backend, query.device, is_double, query.shape[3])


_RELEVANCE_ARGUMENTS = (
    "Tensor tokens, Tensor class_embeddings, Tensor? norm_weight, Tensor? norm_bias, "
    "float? norm_eps, Tensor? proj"
)


@_define(f"token_relevance({_RELEVANCE_ARGUMENTS}, int num_prefix_tokens, str backend) -> Tensor")
def token_relevance(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    num_prefix_tokens: int,
    backend: str,
) -> Tensor:
    module = _relevance_backend(backend, tokens, class_embeddings, norm_weight, norm_bias, proj)
    batch, length, _ = tokens.shape
    num_patches = length - num_prefix_tokens
    if batch == 0 or num_patches == 0:
        return tokens.new_empty(
            (batch, class_embeddings.shape[-2], num_patches), dtype=torch.float32
        )
    return module.relevance(
        tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens
    )


@torch.library.register_fake("tir_kernels::token_relevance", lib=_LIBRARY)
def _(tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens, backend):
    shape = (tokens.shape[0], class_embeddings.shape[-2], tokens.shape[1] - num_prefix_tokens)
    return tokens.new_empty(shape, dtype=torch.float32)


@_define(
    f"token_weights({_RELEVANCE_ARGUMENTS}, Tensor table, float top_ratio, int num_prefix_tokens, "
    "str backend) -> (Tensor weights, Tensor counts)"
)
def token_weights(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    table: Tensor,
    top_ratio: float,
    num_prefix_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _relevance_backend(
        backend, tokens, class_embeddings, norm_weight, norm_bias, proj, table
    )
    batch, length, _ = tokens.shape
    num_patches = length - num_prefix_tokens
    if batch == 0 or num_patches == 0:
        return (
            tokens.new_ones((batch, length), dtype=table.dtype),
            tokens.new_empty((batch, num_patches), dtype=torch.int32),
        )
    return module.token_weights(
        tokens,
        class_embeddings,
        norm_weight,
        norm_bias,
        norm_eps,
        proj,
        table,
        int(num_patches * top_ratio),
        num_prefix_tokens,
    )


@torch.library.register_fake("tir_kernels::token_weights", lib=_LIBRARY)
def _(
    tokens,
    class_embeddings,
    norm_weight,
    norm_bias,
    norm_eps,
    proj,
    table,
    top_ratio,
    num_prefix_tokens,
    backend,
):
    batch, length, _ = tokens.shape
    weights = tokens.new_empty((batch, length), dtype=table.dtype)
    return weights, tokens.new_empty((batch, length - num_prefix_tokens), dtype=torch.int32)


@_define(
    "weighted_attention(Tensor query, Tensor key, Tensor value, Tensor weights, float scale, "
    "str backend) -> (Tensor output, Tensor log_sum_exp)"
)
def weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    module = _attention_backend(backend, query)
    if query.numel() == 0:
        return (
            query.new_empty(query.shape),
            weights.new_empty(query.shape[:3]).fill_(-torch.inf),
        )
    return module.attention_forward(query, key, value, weights, scale)


@torch.library.register_fake("tir_kernels::weighted_attention", lib=_LIBRARY)
def _(query, key, value, weights, scale, backend):
    return query.new_empty(query.shape), weights.new_empty(query.shape[:3])


@_define(
    "weighted_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor weights, Tensor output, Tensor log_sum_exp, float scale, bool needs_weights_grad, "
    "str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weights)"
)
def weighted_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    needs_weights_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _attention_backend(backend, query)
    if query.numel() == 0:
        grad_weights = weights.new_zeros(weights.shape if needs_weights_grad else (0,))
        empty = [t.new_empty(t.shape) for t in (query, key, value)]
        return empty[0], empty[1], empty[2], grad_weights
    if grad_output.stride(3) != 1:
        grad_output = grad_output.contiguous()
    return module.attention_backward(
        grad_output, query, key, value, weights, output, log_sum_exp, scale, needs_weights_grad
    )


@torch.library.register_fake("tir_kernels::weighted_attention_backward", lib=_LIBRARY)
def _(
    grad_output,
    query,
    key,
    value,
    weights,
    output,
    log_sum_exp,
    scale,
    needs_weights_grad,
    backend,
):
    grads = tuple(t.new_empty(t.shape) for t in (query, key, value))
    return (*grads, weights.new_empty(weights.shape if needs_weights_grad else (0,)))


@_define(
    f"reweighted_attention(Tensor query, Tensor key, Tensor value, {_RELEVANCE_ARGUMENTS}, "
    "Tensor table, float top_ratio, int num_prefix_tokens, float scale, str backend) "
    "-> (Tensor output, Tensor log_sum_exp, Tensor counts)"
)
def reweighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    table: Tensor,
    top_ratio: float,
    num_prefix_tokens: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    relevance_inputs = (tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj)
    module = _attention_backend(backend, query)
    num_patches = tokens.shape[1] - num_prefix_tokens
    tensors = (class_embeddings, norm_weight, norm_bias, proj, table)
    if (
        hasattr(module, "reweighted_forward")
        and module is _relevance_backend(backend, tokens, *tensors)
        and query.numel() > 0
        and num_patches > 0
    ):
        top_k = int(num_patches * top_ratio)
        return module.reweighted_forward(
            query, key, value, *relevance_inputs, table, top_k, num_prefix_tokens, scale
        )
    weights, counts = token_weights(*relevance_inputs, table, top_ratio, num_prefix_tokens, backend)
    return (*weighted_attention(query, key, value, weights, scale, backend), counts)


@torch.library.register_fake("tir_kernels::reweighted_attention", lib=_LIBRARY)
def _(
    query,
    key,
    value,
    tokens,
    class_embeddings,
    norm_weight,
    norm_bias,
    norm_eps,
    proj,
    table,
    top_ratio,
    num_prefix_tokens,
    scale,
    backend,
):
    counts_shape = (tokens.shape[0], tokens.shape[1] - num_prefix_tokens)
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape[:3], dtype=table.dtype),
        tokens.new_empty(counts_shape, dtype=torch.int32),
    )


@_define(
    "reweighted_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, "
    "Tensor counts, Tensor table, Tensor output, Tensor log_sum_exp, float scale, "
    "bool needs_weights_grad, str backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_weights)"
)
def reweighted_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    table: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    needs_weights_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = _attention_backend(backend, query)
    if hasattr(module, "reweighted_backward") and query.numel() > 0 and counts.numel() > 0:
        if grad_output.stride(3) != 1:
            grad_output = grad_output.contiguous()
        return module.reweighted_backward(
            grad_output,
            query,
            key,
            value,
            counts,
            table,
            output,
            log_sum_exp,
            scale,
            needs_weights_grad,
        )
    num_prefix_tokens = query.shape[2] - counts.shape[1]
    weights = torch.nn.functional.pad(table[counts.long()], (num_prefix_tokens, 0), value=1.0)
    return weighted_attention_backward(
        grad_output,
        query,
        key,
        value,
        weights,
        output,
        log_sum_exp,
        scale,
        needs_weights_grad,
        backend,
    )


@torch.library.register_fake("tir_kernels::reweighted_attention_backward", lib=_LIBRARY)
def _(
    grad_output,
    query,
    key,
    value,
    counts,
    table,
    output,
    log_sum_exp,
    scale,
    needs_weights_grad,
    backend,
):
    grads = tuple(t.new_empty(t.shape) for t in (query, key, value))
    weights_shape = (query.shape[0], query.shape[2]) if needs_weights_grad else (0,)
    return (*grads, log_sum_exp.new_empty(weights_shape))
