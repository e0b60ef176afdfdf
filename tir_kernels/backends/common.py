"""Helpers that backends share when they hand tensors to kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RowGrid = tuple[int, int, int, int]  # address, and the strides of batch, head and row

COSINE_EPS = 1e-8  # added to both norms of the cosine
MAX_EXPONENT = 88.0  # exp() of more overflows float32
LOG2_E = 1.4426950408889634

TYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def row_grid(tensor: Tensor) -> RowGrid:
    strides = tensor.stride()
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def reason_of_all(reason_of: Callable[[int], str]) -> str:
    """Empty if some GPU is served, else why the current one is not.

    Args:
        reason_of: Why a GPU, by its index, is not served; empty if it is.
    """
    reason = reason_of(torch.cuda.current_device())
    if reason and any(not reason_of(index) for index in range(torch.cuda.device_count())):
        return ""
    return reason


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device current where it is not: a launch goes to the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
