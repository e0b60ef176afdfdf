"""A second derivative is an error where it would not be exact.

PyTorch's own ``once_differentiable`` refuses only where the incoming gradient requires one: for a
penalty on the gradient of ``f(x).sum()`` it does not, and the penalty's gradient would be 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(way_out: str) -> Callable[[Backward], Backward]:
    """Decorate a backward pass of which no derivative is known.

    Args:
        way_out: What to do for a second derivative, as the end of the error's sentence.

    Returns:
        A decorator. The decorated function takes the saved tensors after ``ctx``: they can be
        unpacked only once where a checkpoint has to compute them. Every input that the gradients
        depend on must be among them, as itself.
    """

    def decorate(gradients: Backward) -> Backward:
        @functools.wraps(gradients)
        def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            # The grad mode is that of create_graph. torch.compile refuses by itself.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients(ctx, saved, *grad_outputs)
            with torch.no_grad():
                grads = gradients(ctx, saved, *grad_outputs)
            return _refuse(grads, (*saved, *grad_outputs), f"{gradients.__qualname__}: {way_out}")

        return backward

    return decorate


def _refuse(
    grads: Sequence[Tensor | None], sources: Sequence[Tensor | None], reason: str
) -> tuple[Tensor | None, ...]:
    """Gradients that depend on what they were computed from, by a dependence that is an error."""
    roots = [source for source in sources if source is not None and source.requires_grad]
    given = [grad for grad in grads if grad is not None]
    guarded = iter(_Refusal.apply(reason, len(given), *given, *roots))
    return tuple(None if grad is None else next(guarded) for grad in grads)


class _Refusal(torch.autograd.Function):
    """The first ``count`` tensors as they are; their derivative is an error."""

    @staticmethod
    def forward(reason: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.reason = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"tir_kernels computes no second derivative here: {ctx.reason}")
