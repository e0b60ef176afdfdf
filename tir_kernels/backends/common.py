"""What backends share when they hand tensors to kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

RowGrid = tuple[int, int, int, int]  # address, and the strides of batch, head and row

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


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device current where it is not: a launch goes to the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
