"""Shared parts of the kernels: loading and storing rows of a head, products, and launching."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import common
from .. import interpreter_is_on

LOG2_E = tl.constexpr(common.LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)
# Below this the hardware's logarithm sees 0. NaN is not below it: it stays, and shows.
SMALLEST_WEIGHT = tl.constexpr(1.1754943508222875e-38)

# Triton compiles or interprets a kernel as it was when the kernel was defined; so does this.
INTERPRETED = tl.constexpr(interpreter_is_on())


@triton.jit
def loop_end(number):
    """A run-time number as the end of a range()."""
    if INTERPRETED:  # before Triton 3.7 it cannot make an index of its integers under NumPy 2.4
        return number.handle.data.item()
    return number


@triton.jit
def load_rows(
    pointer,
    rows,
    keep,
    row_stride,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Columns FIRST to FIRST + WIDTH of some rows; 0 where a row is not kept or past HEAD_DIM."""
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = rows.to(tl.int64) * row_stride
    if STRIDE_UNIT > 1:  # without the hint a head width such as 72 would be read by twos of bytes
        offsets = tl.multiple_of(offsets, STRIDE_UNIT)
    mask = keep[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer,
    rows,
    keep,
    tile,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write columns FIRST to FIRST + WIDTH of contiguous rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = keep[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(pointer + offsets, narrow(tile, pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_key_weights(weights_ptr, keys, length):
    """The weights of some keys, whether each is attended to, and the base-2 logarithm of those that
    are. A key past the end has a weight of 0.
    """
    weights = tl.load(weights_ptr + keys, mask=keys < length, other=0.0)
    attended = (weights < SMALLEST_WEIGHT) == 0
    return weights, attended, tl.log2(tl.where(attended, weights, 1.0))


@triton.jit
def head_offset(batch, head, batch_stride, head_stride, STRIDE_UNIT: tl.constexpr):
    """Where a head of an image begins, in elements, in 64 bits."""
    offset = batch.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
    return tl.multiple_of(offset, STRIDE_UNIT)


@triton.jit
def dot(left, right, total):
    """total + left @ right, summed in float32; float32 operands are multiplied as such."""
    if INTERPRETED:  # it would multiply the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def narrow(tile, dtype: tl.constexpr):
    """Convert float32 to the type of the operands, rounding to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # it would cut the lower bits off
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        tile = tl.where(tile != tile, tile, bits.to(tl.float32, bitcast=True))
    return tile.to(dtype)


def stride_unit(*tensors: Tensor) -> int:
    """The largest power of two, at most 8, that divides every stride but the last.

    Eight 16-bit elements fill the widest load there is.
    """
    unit = 8
    for tensor in tensors:
        for stride in tensor.stride()[:-1]:
            while stride % unit:
                unit //= 2
    return unit


@functools.cache
def _capability_of_index(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_capability(device: torch.device) -> tuple[int, int]:
    return _capability_of_index(device.index) if device.type == "cuda" else (8, 0)
