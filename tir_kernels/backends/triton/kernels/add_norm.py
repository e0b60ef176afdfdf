"""Residual and layer normalisation of rows, and their gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from .tiles import narrow


@triton.jit
def _statistics(total, exists, num_channels, eps):
    """The row without its mean, and one over its standard deviation."""
    mean = tl.sum(total, 0) / num_channels
    centred = tl.where(exists, total - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / num_channels
    return centred, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def add_norm_kernel(
    hidden_ptr,  # [rows, D]
    change_ptr,  # [rows, D] or None
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    total_ptr,  # [rows, D], written where there is a change
    normed_ptr,  # [rows, D]
    num_channels,
    eps,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * num_channels
    channel = tl.arange(0, BLOCK)
    exists = channel < num_channels
    total = tl.load(hidden_ptr + first + channel, mask=exists, other=0.0).to(tl.float32)
    if change_ptr is not None:
        total += tl.load(change_ptr + first + channel, mask=exists, other=0.0).to(tl.float32)
        rounded = narrow(total, total_ptr.dtype.element_ty)
        tl.store(total_ptr + first + channel, rounded, mask=exists)
        total = rounded.to(tl.float32)  # what the backward pass finds
    centred, scale = _statistics(total, exists, num_channels, eps)
    normed = centred * scale
    normed *= tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    normed = narrow(normed, normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + first + channel, normed, mask=exists)


@triton.jit
def add_norm_backward_kernel(
    total_ptr,  # [rows, D]
    weight_ptr,  # [D]
    grad_total_ptr,  # [rows, D] or None
    grad_normed_ptr,  # [rows, D]
    grad_hidden_ptr,  # [rows, D]
    grad_change_ptr,  # [rows, D] of another type, or None
    num_channels,
    eps,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * num_channels
    channel = tl.arange(0, BLOCK)
    exists = channel < num_channels
    total = tl.load(total_ptr + first + channel, mask=exists, other=0.0).to(tl.float32)
    centred, scale = _statistics(total, exists, num_channels, eps)
    normed = centred * scale
    slope = tl.load(grad_normed_ptr + first + channel, mask=exists, other=0.0).to(tl.float32)
    slope *= tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    along_mean = tl.sum(slope, 0) / num_channels
    along_normed = tl.sum(slope * normed, 0) / num_channels
    grad = scale * (slope - along_mean - normed * along_normed)
    if grad_total_ptr is not None:
        grad += tl.load(grad_total_ptr + first + channel, mask=exists, other=0.0).to(tl.float32)
    of_hidden = narrow(grad, grad_hidden_ptr.dtype.element_ty)
    tl.store(grad_hidden_ptr + first + channel, of_hidden, mask=exists)
    if grad_change_ptr is not None:
        of_change = narrow(grad, grad_change_ptr.dtype.element_ty)
        tl.store(grad_change_ptr + first + channel, of_change, mask=exists)


def add_norm(
    hidden: Tensor,
    change: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
) -> None:
    vectors = weight.contiguous(), None if bias is None else bias.contiguous()
    num_channels = hidden.shape[-1]
    with device_guard(hidden.device):
        add_norm_kernel[(hidden.numel() // num_channels,)](
            hidden, change, *vectors, total, normed, num_channels, eps, **_options(num_channels)
        )


def add_norm_backward(
    total: Tensor,
    weight: Tensor,
    grad_total: Tensor | None,
    grad_normed: Tensor,
    eps: float,
    grad_hidden: Tensor,
    grad_change: Tensor,
) -> None:
    num_channels = total.shape[-1]
    with device_guard(total.device):
        add_norm_backward_kernel[(total.numel() // num_channels,)](
            total,
            weight.contiguous(),
            grad_total,
            grad_normed,
            grad_hidden,
            grad_change if grad_change.numel() else None,
            num_channels,
            eps,
            **_options(num_channels),
        )


def _options(num_channels: int) -> dict[str, int]:
    """A row is a program's, with 8 numbers a lane or more."""
    block = triton.next_power_of_2(num_channels)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}
