"""The library that PyTorch knows the operators by, and the base of their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("tir_kernels", "DEF")

OPS = torch.ops.tir_kernels


def define(schema: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the implementation of an operator on every device.

    It gets the schema's arguments by position, already validated by the public function. Here
    "auto" is resolved, so that a compiled graph picks by the tensors it is run on, and empty inputs
    are answered, so that no backend needs to think of them.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)

    def register(function: Callable) -> Callable:
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def define_fake(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator's inference of shapes and types."""
    return torch.library.register_fake(f"tir_kernels::{name}", lib=_LIBRARY)


class Operator(torch.autograd.Function):
    """Base of the operators' functions: a shorter way for eager calls, and the refusal of vmap.

    ``forward`` calls the operator that a subclass names.
    """

    operator: str
    _eager: type[torch.autograd.Function]

    def __init_subclass__(cls) -> None:
        operator = getattr(OPS, cls.operator)

        def call_operator(*inputs: Any) -> Any:
            return operator(*inputs)

        # torch.compile counts the parameters to tell whether the first of them is a context.
        names = [argument.name for argument in operator.default._schema.arguments]
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names]
        setattr(call_operator, "__signature__", inspect.Signature(parameters))  # noqa: B010
        cls.forward = staticmethod(call_operator)  # type: ignore[method-assign]

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
