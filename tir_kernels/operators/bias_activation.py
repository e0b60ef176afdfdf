"""Bias and activation of a frozen layer, in one pass that keeps only what comes in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.operators.checks import require_float, require_same_device
from tir_kernels.operators.choose import choose_backend, require_backend
from tir_kernels.operators.library import OPS, define, define_fake
from tir_kernels.operators.second_derivative import differentiable_once

ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")


def bias_activation(
    hidden: Tensor, bias: Tensor | None, kind: str = "gelu", *, backend: str = "auto"
) -> Tensor:
    """``activation(hidden + bias)`` with a frozen bias, computed in float32.

    Args:
        hidden: (..., D) float32, float16, bfloat16 or, on the reference backend, float64; it may
            require gradients.
        bias: (D,), to which no gradient flows; ``None`` for none.
        kind: "gelu" (exact, by the error function), "quick_gelu" (``x * sigmoid(1.702 x)``) or
            "gelu_tanh" (PyTorch's ``approximate="tanh"``).
        backend: "auto", or a name of :func:`available_backends` that has this operation.

    Raises:
        ValueError, TypeError: A shape, type or kind outside these, a bias that requires gradients,
            or a backend that has no activations.
        RuntimeError: A backend that cannot run here.
    """
    require_backend(backend)
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}; got {kind!r}")
    require_float("hidden", hidden, "(..., D)")
    if hidden.dim() == 0:
        raise ValueError("hidden must have shape (..., D); got ()")
    if bias is not None:
        require_float("bias", bias, "(D,)")
        if bias.shape != hidden.shape[-1:]:
            raise ValueError(f"bias must have shape ({hidden.shape[-1]},); got {tuple(bias.shape)}")
        require_same_device("bias", bias, "hidden", hidden)
        if bias.requires_grad:
            raise ValueError("bias must be frozen: no gradient flows to it; detach it")
    return _BiasActivation.apply(hidden, bias, kind, backend)


@define(
    "bias_activation(Tensor hidden, Tensor? bias, str kind, Tensor? grad_output, str backend) "
    "-> Tensor"
)
def _bias_activation(
    hidden: Tensor, bias: Tensor | None, kind: str, grad_output: Tensor | None, name: str
) -> Tensor:
    backend: Any = choose_backend(name, "bias_activation", hidden.device, hidden.dtype)
    hidden = hidden.contiguous()
    grad_output = None if grad_output is None else grad_output.contiguous()
    if hidden.numel() == 0:
        return torch.empty_like(hidden)
    return backend.bias_activation(hidden, bias, kind, grad_output)


@define_fake("bias_activation")
def _(hidden: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


class _BiasActivation(torch.autograd.Function):
    """Keeps what comes in and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, kind: str, backend: str) -> Tensor:
        ctx.save_for_backward(hidden, bias)
        ctx.kind, ctx.backend = kind, backend
        return OPS.bias_activation(hidden, bias, kind, None, backend)

    @staticmethod
    @differentiable_once("use torch.nn.functional.gelu(hidden + bias), or its like, instead")
    def backward(ctx: Any, saved: tuple, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        grad = OPS.bias_activation(*saved, ctx.kind, grad_output, ctx.backend)
        return grad, None, None, None
