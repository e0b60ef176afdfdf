"""What all low-rank changes of a model need in a pass, made at once instead of layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tir_kernels.operators.second_derivative import differentiable_once


class Shared(NamedTuple):
    """The parts of one layer.

    Args:
        a: Its factor A in the type of the pass.
        b: Its factor B, scaled, in the same type.
        step: Copy of the step of its dropout.
    """

    a: Tensor
    b: Tensor
    step: Tensor


# By the id of a layer; of the pass of the thread itself, since threads may share a model.
_SHARED: ContextVar[Mapping[int, Shared]] = ContextVar("shared", default=MappingProxyType({}))


def shared_parts(layer: Any, dtype: torch.dtype) -> Shared | None:
    """The parts of a layer in the pass under way, if they were made at once and in this type."""
    if torch.compiler.is_compiling():
        return None
    found = _SHARED.get().get(id(layer))
    return found if found is not None and found.a.dtype == dtype else None


@contextmanager
def one_pass(
    layers: Sequence[Any], scaling: float, step: Tensor, dtype: torch.dtype
) -> Iterator[list[Tensor]]:
    """Convert the factors of all layers at once, for the forward pass inside of the context.

    It gives the tensors that it made.

    Layer by layer, each factor would take a launch or two on a GPU, and its gradient as many.

    Args:
        layers: ``LowRank`` changes, which must not be changed inside.
        scaling: Of all of them.
        step: (1,) int64 of their dropout.
        dtype: The type in which they multiply.
    """
    factors = [*(layer.a for layer in layers), *(layer.b for layer in layers)]
    cast = _Cast.apply(scaling, dtype, *factors)
    step, count = step.clone(), len(layers)
    parts = zip(layers, cast[:count], cast[count:], strict=True)
    found = {id(layer): Shared(a, b, step) for layer, a, b in parts}
    token = _SHARED.set({**_SHARED.get(), **found})
    try:
        yield [*cast, step]
    finally:
        _SHARED.reset(token)


class _Cast(torch.autograd.Function):
    """Every A and ``B scaling`` in another type."""

    @staticmethod
    def forward(ctx: Any, scaling: float, dtype: torch.dtype, *factors: Tensor) -> Any:
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        count = len(factors) // 2
        scaled = torch._foreach_mul(factors[count:], scaling)
        cast = [torch.empty_like(factor, dtype=dtype) for factor in factors]
        torch._foreach_copy_(cast, [*factors[:count], *scaled])
        return tuple(cast)

    @staticmethod
    @differentiable_once("convert the factors by themselves")
    def backward(ctx: Any, saved: tuple, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = {index: grad for index, grad in enumerate(grads) if grad is not None}
        found = {i: torch.empty_like(grad, dtype=torch.float32) for i, grad in given.items()}
        torch._foreach_copy_(list(found.values()), list(given.values()))
        of_b = [grad for index, grad in found.items() if index >= len(grads) // 2]
        if of_b:
            torch._foreach_mul_(of_b, ctx.scaling)
        return (None, None, *(found.get(index) for index in range(len(grads))))
