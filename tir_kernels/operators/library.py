"""The library that PyTorch knows the operators by, and the base of their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_LIBRARY = torch.library.Library("tir_kernels", "DEF")

OPS = torch.ops.tir_kernels

_implementations: dict[str, Callable] = {}


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

        def call(*inputs: Any) -> Any:
            # A backend of one's own may give a list, which autograd would not look into.
            results = function(*inputs)
            return tuple(results) if type(results) is list else results

        _implementations[name] = call
        return function

    return register


def define_fake(name: str) -> Callable[[Callable], Callable]:
    """Register the decorated function as the operator's inference of shapes and types."""
    return torch.library.register_fake(f"tir_kernels::{name}", lib=_LIBRARY)


# Tensors of these keys alone mean to PyTorch's dispatcher what they mean to the implementations.
_PLAIN_KEYS = {
    *("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA"),
    *("AutocastCPU", "AutocastCUDA"),
}
_keys_of = getattr(torch._C, "_dispatch_keys", None)
_is_plain_set: dict[int, bool] = {}


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor means the same to the dispatcher as to the implementations."""
    if _keys_of is None:
        return False
    keys = _keys_of(tensor)
    known = _is_plain_set.get(keys.raw_repr())
    if known is None:
        names = {name.strip() for name in str(keys).partition("(")[2].strip(")").split(",")}
        known = _is_plain_set[keys.raw_repr()] = names <= _PLAIN_KEYS
    return known


# Looked up once: each look-up costs small calls time whose caches hold something else.
_is_compiling = torch.compiler.is_compiling
_has_function_transforms = torch._C._are_functorch_transforms_active
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_function_mode = torch._C._is_torch_function_mode_enabled
_is_profiled = torch.autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state


def is_transformed() -> bool:
    """Whether a compiler or a transform of functions is at work."""
    return _is_compiling() or _has_function_transforms()


def is_watched() -> bool:
    """Whether a mode, a profiler or a tracer would see a call of the dispatcher."""
    return (
        _num_dispatch_modes() > 0
        or _has_function_mode()
        or _is_profiled()
        or _tracing_state() is not None
    )


def _is_unnoticed(inputs: tuple[Any, ...]) -> bool:
    """Whether a call on these could go past the dispatcher, which takes tens of microseconds."""
    return not is_watched() and all(
        is_plain(each) if type(each) in (Tensor, Parameter) else not isinstance(each, Tensor)
        for each in inputs
    )


def call_operator(name: str, *inputs: Any) -> Any:
    """The results of an operator, which have no gradients: past the dispatcher if unnoticed."""
    if not is_transformed() and _is_unnoticed(inputs):
        return _implementations[name](*inputs)
    return getattr(OPS, name)(*inputs)


class Operator(torch.autograd.Function):
    """Base of the operators' functions: a shorter way for eager calls, and the refusal of vmap.

    ``forward`` calls the operator that a subclass names.
    """

    operator: str
    _implementation: Callable
    _by: type[torch.autograd.Function]  # what is given as the last input

    def __init_subclass__(cls) -> None:
        operator = getattr(OPS, cls.operator)

        def call_operator(*inputs: Any) -> Any:
            return operator(*inputs)

        # torch.compile counts the parameters to tell whether the first of them is a context.
        names = [argument.name for argument in operator.default._schema.arguments]
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names]
        setattr(call_operator, "__signature__", inspect.Signature(parameters))  # noqa: B010
        cls.forward = staticmethod(call_operator)  # type: ignore[method-assign]
        cls._implementation = staticmethod(_implementations[cls.operator])
        cls._by = cls._eager()

    @classmethod
    def _eager(cls) -> type[torch.autograd.Function]:
        """The function without a ``setup_context``, by an implementation that is its last input."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            inputs, implementation = arguments[:-1], arguments[-1]
            output = implementation(*inputs)
            cls.setup_context(ctx, inputs, output)
            return output

        def backward(ctx: Any, *grads: Any) -> tuple:
            return (*cls.backward(ctx, *grads), None)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # Of the same name, which grad_fn shows.
        return type(cls.__name__, (torch.autograd.Function,), members)

    @classmethod
    def call(cls, *inputs: Any) -> Any:
        """The result of ``apply`` in a fraction of its time.

        PyTorch takes tens of microseconds to call a function that has a ``setup_context``, which
        only its transforms and compiler need, and some more for its dispatcher and for a function
        where nothing asks for them.
        """
        if is_transformed():
            return cls.apply(*inputs)
        implementation = cls._implementation if _is_unnoticed(inputs) else cls.forward
        requires_grad = torch.is_grad_enabled() and any(
            isinstance(each, Tensor) and each.requires_grad for each in inputs
        )
        # Forward differentiation is for the function to refuse.
        if requires_grad or forward_ad._current_level >= 0:
            return cls.call_by(implementation, *inputs)
        return implementation(*inputs)

    @classmethod
    def call_by(cls, implementation: Callable, *inputs: Any) -> Any:
        """The same by an implementation of the caller's, for plain tensors that require a gradient
        where nothing looks on.
        """
        return cls._by.apply(*inputs, implementation)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "tir_kernels operators have no torch.func.vmap rule: fold the mapped dimension into "
            "the batch dimension B (class embeddings then take shape (G, C, E)) and unfold the "
            "result"
        )
