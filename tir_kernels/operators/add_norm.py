"""Residual and frozen layer normalisation, in one pass that keeps only their sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.operators.checks import require_float, require_same_device
from tir_kernels.operators.choose import choose_backend, require_backend
from tir_kernels.operators.library import OPS, define, define_fake
from tir_kernels.operators.second_derivative import differentiable_once


def add_norm(
    hidden: Tensor,
    change: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``total = hidden + change`` and its layer normalisation, which is computed in float32.

    Args:
        hidden: (..., D) float32, float16, bfloat16 or, on the reference backend, float64.
        change: As ``hidden``, of its type or a lower one; ``None``: nothing is added.
        weight, bias: (D,), to which no gradient flows; ``bias`` may be ``None``.
        eps: Added to the variance.
        dtype: Type of the normalised result; ``None``: that of ``hidden``.
        backend: "auto", or a name of :func:`available_backends` that has this operation.

    Returns:
        The total, in the type of ``hidden``, and it normalised. Gradients flow to ``hidden`` and
        ``change``.

    Raises:
        ValueError, TypeError: A shape or type outside these, a weight or bias that requires
            gradients, or a backend that has no normalisation.
        RuntimeError: A backend that cannot run here.
    """
    require_backend(backend)
    require_float("hidden", hidden, "(..., D)")
    if hidden.dim() == 0:
        raise ValueError("hidden must have shape (..., D); got ()")
    for name, each, shape in (
        ("change", change, hidden.shape),
        ("weight", weight, hidden.shape[-1:]),
        ("bias", bias, hidden.shape[-1:]),
    ):
        if each is None:
            continue
        require_float(name, each, str(tuple(shape)))
        if each.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(each.shape)}")
        require_same_device(name, each, "hidden", hidden)
        if name != "change" and each.requires_grad:
            raise ValueError(f"{name} must be frozen: no gradient flows to it; detach it")
    if change is not None and torch.promote_types(change.dtype, hidden.dtype) != hidden.dtype:
        raise TypeError(
            f"change must be of the type of hidden, {hidden.dtype}, or a lower one; "
            f"got {change.dtype}"
        )
    dtype = hidden.dtype if dtype is None else dtype
    return _AddNorm.apply(hidden, change, weight, bias, float(eps), dtype, backend)


@define(
    "add_norm(Tensor hidden, Tensor? change, Tensor weight, Tensor? bias, float eps, "
    "ScalarType dtype, str backend) -> (Tensor total, Tensor normed)"
)
def _add_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
    hidden, change, weight, bias, eps, _, name = arguments
    total, normed = _like_results(*arguments)
    if hidden.numel():
        backend: Any = choose_backend(name, "add_norm", hidden.device, hidden.dtype)
        change = None if change is None else change.contiguous()
        backend.add_norm(hidden.contiguous(), change, weight, bias, eps, total, normed)
    return total, normed


@define_fake("add_norm")
def _like_results(
    hidden: Tensor, change: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The total, which is (0,) where nothing is added, and it normalised, as yet unwritten."""
    total = hidden.new_empty((0,) if change is None else hidden.shape)
    return total, hidden.new_empty(hidden.shape, dtype=rest[2])


@define(
    "add_norm_backward(Tensor total, Tensor weight, Tensor? grad_total, Tensor grad_normed, "
    "float eps, ScalarType dtype, str backend) -> (Tensor grad_hidden, Tensor grad_change)"
)
def _add_norm_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    total, weight, grad_total, grad_normed, eps, _, name = arguments
    results = _like_gradients(*arguments)
    if total.numel():
        backend: Any = choose_backend(name, "add_norm", total.device, total.dtype)
        grad_total = None if grad_total is None else grad_total.contiguous()
        grads = grad_total, grad_normed.contiguous()
        backend.add_norm_backward(total.contiguous(), weight, *grads, eps, *results)
    return results


@define_fake("add_norm_backward")
def _like_gradients(total: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The gradient in the type of the total, and in ``dtype``: (0,) where that is the same."""
    shape = (0,) if rest[4] == total.dtype else total.shape
    return total.new_empty(total.shape), total.new_empty(shape, dtype=rest[4])


class _AddNorm(torch.autograd.Function):
    """Keeps the total, of which the backward pass takes the statistics again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        change: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, normed = OPS.add_norm(hidden, change, weight, bias, eps, dtype, backend)
        total = hidden if change is None else total
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.backend = eps, backend
        ctx.dtype = hidden.dtype if change is None else change.dtype
        return total, normed

    @staticmethod
    @differentiable_once("use torch.nn.functional.layer_norm(hidden + change, ...) instead")
    def backward(
        ctx: Any, saved: tuple, grad_total: Tensor | None, grad_normed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight = saved
        if grad_normed is None:
            grad = of_change = grad_total
            if grad is not None:
                of_change = grad.to(ctx.dtype)
        else:
            grad, of_change = OPS.add_norm_backward(
                total, weight, grad_total, grad_normed, ctx.eps, ctx.dtype, ctx.backend
            )
            of_change = grad if ctx.dtype == total.dtype else of_change
        of_hidden = grad if ctx.needs_input_grad[0] else None
        of_change = of_change if ctx.needs_input_grad[1] else None
        return of_hidden, of_change, None, None, None, None, None
