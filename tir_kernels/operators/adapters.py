"""Operators that training adapters on frozen layers needs: counted dropout, and activations.

Their kernels are compiled ones on a CPU and Triton's on a GPU; elsewhere plain PyTorch serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.operators.checks import require_same_device, require_tensor
from tir_kernels.operators.choose import AUTO_ORDER, load_backend, refusal
from tir_kernels.operators.second_derivative import differentiable_once
from tir_kernels.scalars import real_number, whole_number

ACTIVATIONS = ("gelu", "quick_gelu")

_LIBRARY = torch.library.Library("tir_kernels", "FRAGMENT")
_LIBRARY.define(
    "philox_dropout(Tensor rows, Tensor seeds, Tensor step, int stream, int first_branch, "
    "int num_branches, float probability, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "bias_activation(Tensor hidden, Tensor? bias, str kind, Tensor? grad_output) -> Tensor"
)


def _serving(function: str, tensor: Tensor) -> Any:
    """The function of the fastest backend that has it and runs here."""
    device, is_double = tensor.device, tensor.dtype == torch.float64
    for name in AUTO_ORDER.get(device.type, ()):
        backend = load_backend(name)
        if hasattr(backend, function) and not refusal(name, device, is_double):
            return getattr(backend, function)
    return getattr(load_backend("reference"), function)


def _philox_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    stream: int,
    first_branch: int,
    num_branches: int,
    probability: float,
    dtype: torch.dtype,
) -> Tensor:
    rows = rows.contiguous()
    groups, sequences, length, width = rows.shape
    output = rows.new_empty((groups, num_branches, sequences, length, width), dtype=dtype)
    if output.numel() == 0:
        return output
    # 16 bits decide: what is drawn has a probability that is a multiple of 2^-16.
    threshold = min(round(probability * 2**16), 2**16 - 1)
    scale = 1 / (1 - threshold / 2**16)
    _serving("philox_dropout", rows)(
        rows, seeds, step, stream, first_branch, threshold, scale, output
    )
    return output


_LIBRARY.impl("philox_dropout", _philox_dropout, "CompositeExplicitAutograd")


@torch.library.register_fake("tir_kernels::philox_dropout", lib=_LIBRARY)
def _(rows, seeds, step, stream, first_branch, num_branches, probability, dtype):
    shape = (rows.shape[0], num_branches, *rows.shape[1:])
    return rows.new_empty(shape, dtype=dtype)


def philox_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    *,
    stream: int = 0,
    first_branch: int = 0,
    num_branches: int = 1,
    probability: float = 0.5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Dropout without state: the random numbers are counted, not drawn one after the other.

    Whether a channel is kept depends on its group's seed, on ``stream``, branch and ``step``, on
    the number of its sequence in the group, its position and its channel: not on the device, the
    other groups or how far sequences are padded. Calling again gives the same. No gradient flows.

    Args:
        rows: (G, S, T, D) of G groups of S sequences; float32, float16 or bfloat16.
        seeds: (G,) int64, on the device of ``rows``.
        step: (1,) int64 in [0, 2^32), on the device of ``rows``.
        stream: Which layer asks, in [0, 256).
        first_branch, num_branches: Each of K branches gets dropout of its own, numbered from
            ``first_branch``; the numbers end before 256.
        probability: Of being dropped, in [0, 1); rounded to a multiple of 2^-16.
        dtype: Of the result; ``None``: that of ``rows``.

    Returns:
        (G, K, S, T, D): 0 where dropped, else ``rows / (1 - probability)``.

    Raises:
        ValueError, TypeError: A shape, type or number outside these.
    """
    require_tensor("rows", rows, "(G, S, T, D)")
    for name, tensor, shape in (("seeds", seeds, rows.shape[:1]), ("step", step, (1,))):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int64 tensor; got {kind}")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} beside rows of shape {tuple(rows.shape)}; "
                f"got {tuple(tensor.shape)}"
            )
        require_same_device(name, tensor, "rows", rows)
    probability = real_number("probability", probability)
    if not 0 <= probability < 1:
        raise ValueError(f"probability must lie in [0, 1); got {probability}")
    stream = whole_number("stream", stream)
    first_branch = whole_number("first_branch", first_branch)
    num_branches = whole_number("num_branches", num_branches)
    end_branch = first_branch + num_branches
    if not (0 <= stream < 256 and 0 <= first_branch <= end_branch <= 256):
        raise ValueError(
            f"stream and branches must lie in [0, 256); got stream {stream}, branches "
            f"{first_branch} to {end_branch - 1}"
        )
    return torch.ops.tir_kernels.philox_dropout(
        rows.detach(),
        seeds,
        step,
        stream,
        first_branch,
        num_branches,
        probability,
        dtype or rows.dtype,
    )


def _bias_activation(
    hidden: Tensor, bias: Tensor | None, kind: str, grad_output: Tensor | None
) -> Tensor:
    hidden = hidden.contiguous()
    grad_output = None if grad_output is None else grad_output.contiguous()
    if hidden.numel() == 0:
        return torch.empty_like(hidden)
    return _serving("bias_activation", hidden)(hidden, bias, kind, grad_output)


_LIBRARY.impl("bias_activation", _bias_activation, "CompositeExplicitAutograd")


@torch.library.register_fake("tir_kernels::bias_activation", lib=_LIBRARY)
def _(hidden, bias, kind, grad_output):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


class _BiasActivation(torch.autograd.Function):
    """Keeps what comes in and nothing else."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.save_for_backward(hidden, bias)
        ctx.kind = kind
        return torch.ops.tir_kernels.bias_activation(hidden, bias, kind, None)

    @staticmethod
    @differentiable_once("use torch.nn.functional.gelu(hidden + bias), or its like, instead")
    def backward(ctx: Any, saved: tuple, grad_output: Tensor) -> tuple[Tensor, None, None]:
        hidden, bias = saved
        grad = torch.ops.tir_kernels.bias_activation(hidden, bias, ctx.kind, grad_output)
        return grad, None, None


def bias_activation(hidden: Tensor, bias: Tensor | None, kind: str = "gelu") -> Tensor:
    """``activation(hidden + bias)`` with a frozen bias, computed in float32.

    Args:
        hidden: (..., D) float32, float16 or bfloat16; it may require gradients.
        bias: (D,), to which no gradient flows; ``None`` for none.
        kind: "gelu" (exact, by the error function) or "quick_gelu" (``x * sigmoid(1.702 x)``).

    Raises:
        ValueError: An unknown kind, or a bias of another width or that requires gradients.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}; got {kind!r}")
    if bias is not None and bias.shape != hidden.shape[-1:]:
        raise ValueError(f"bias must have shape ({hidden.shape[-1]},); got {tuple(bias.shape)}")
    if bias is not None:
        require_same_device("bias", bias, "hidden", hidden)
    if bias is not None and bias.requires_grad:
        raise ValueError("bias must be frozen: no gradient flows to it; detach it")
    return _BiasActivation.apply(hidden, bias, kind)
