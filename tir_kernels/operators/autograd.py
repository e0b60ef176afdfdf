"""Gradients of the operators (SPEC: selection is piecewise constant, everything else is exact)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.operators.second_derivative import differentiable_once

_OPS = torch.ops.tir_kernels
_WAY_OUT = (
    "write this attention in plain PyTorch to differentiate its gradient, for a penalty on it say"
)


def table_gradient(grad_weights: Tensor, counts: Tensor, table: Tensor) -> Tensor:
    """Sum the gradients of the weights, (B, L), by the count, (B, N), that gave the weight.

    A masked sum per table entry rather than a scatter, whose order of additions is not fixed on a
    GPU.
    """
    num_prefix_tokens = grad_weights.shape[1] - counts.shape[1]
    grads = grad_weights[:, num_prefix_tokens:].reshape(1, -1)
    entries = torch.arange(table.shape[0], device=counts.device, dtype=counts.dtype)
    return torch.where(counts.reshape(1, -1) == entries[:, None], grads, 0.0).sum(1).to(table.dtype)


class _Operator(torch.autograd.Function):
    """Base of the functions below: a shorter way for eager calls, and the refusal of vmap."""

    _eager: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = cls.forward(*inputs)
                cls.setup_context(ctx, inputs, output)
                return output

            backward = staticmethod(cls.backward)

        Eager.__name__ = Eager.__qualname__ = cls.__name__  # what grad_fn shows
        cls._eager = Eager

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """The result of ``apply`` in a fraction of its time.

        PyTorch takes tens of microseconds to call a function that has a ``setup_context``, which
        only its transforms and compiler need.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*inputs)
        return cls._eager.apply(*inputs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "tir_kernels operators have no torch.func.vmap rule: fold the mapped dimension into "
            "the batch dimension B (class embeddings then take shape (G, C, E)) and unfold the "
            "result"
        )


class TokenWeightsFunction(_Operator):
    """Weights and counts from tokens; only the table receives a gradient."""

    @staticmethod
    def forward(
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
        return _OPS.token_weights(
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
        )

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


class WeightedAttention(_Operator):
    """Softmax attention whose keys carry weights; gradients for query, key, value and weights."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _OPS.weighted_attention(query, key, value, weights, scale, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        query, key, value, weights, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, weights, *output)

    @staticmethod
    @differentiable_once(_WAY_OUT)
    def backward(ctx: Any, saved: tuple, grad_output: Tensor, grad_log_sum_exp: None) -> tuple:
        needs_weights_grad = ctx.needs_input_grad[3]
        *grads, grad_weights = _OPS.weighted_attention_backward(
            grad_output, *saved, ctx.scale, needs_weights_grad, ctx.backend
        )
        return (*grads, grad_weights if needs_weights_grad else None, None, None)


class ReweightedAttention(_Operator):
    """Attention whose key weights are derived from tokens and class embeddings.

    ``ReweightedAttention.apply(query, key, value, tokens, class_embeddings, norm_weight, norm_bias,
    norm_eps, proj, table, top_ratio, num_prefix_tokens, scale, backend)`` takes what
    ``tir_kernels.reweighted_attention`` has validated: class embeddings as (G, C, E) and the table
    as (C + 1,) on the device of the tokens. It returns ``(output, log_sum_exp, counts)``; query,
    key, value and the table receive gradients.
    """

    @staticmethod
    def forward(
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
        return _OPS.reweighted_attention(
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
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        query, key, value = inputs[:3]
        table, ctx.scale, ctx.backend = inputs[9], inputs[12], inputs[13]
        attended, log_sum_exp, counts = output
        ctx.mark_non_differentiable(log_sum_exp, counts)
        ctx.save_for_backward(query, key, value, counts, table, attended, log_sum_exp)

    @staticmethod
    @differentiable_once(_WAY_OUT)
    def backward(
        ctx: Any, saved: tuple, grad_output: Tensor, grad_lse: None, grad_counts: None
    ) -> tuple:
        query, key, value, counts, table, attended, log_sum_exp = saved
        needs_table_grad = ctx.needs_input_grad[9]
        *grads, grad_weights = _OPS.reweighted_attention_backward(
            grad_output,
            query,
            key,
            value,
            counts,
            table,
            attended,
            log_sum_exp,
            ctx.scale,
            needs_table_grad,
            ctx.backend,
        )
        grad_table = None
        if needs_table_grad:
            grad_table = table_gradient(grad_weights, counts, table)
        return (*grads, *(None,) * 6, grad_table, *(None,) * 4)
