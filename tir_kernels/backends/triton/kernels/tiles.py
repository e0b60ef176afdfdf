"""Shared parts of the kernels: loading and storing rows of a head, products, and launching."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import common
from .. import interpreter_is_on
from ..configs import split_head_dim

LOG2_E = tl.constexpr(common.LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)

# Triton compiles or interprets a kernel as it was when the kernel was defined; so does this.
INTERPRETED = tl.constexpr(interpreter_is_on())


@triton.jit
def loop_bound(number):
    """A run-time number as the start or the end of a range()."""
    if INTERPRETED:  # before Triton 3.7 it cannot make an index of its integers under NumPy 2.4
        return number.handle.data.item()
    return number


@triton.jit
def locate_rows(num_heads, length, BLOCK: tl.constexpr):
    """This program's first row, its image and head, and the head's number among those of all."""
    num_blocks = tl.cdiv(length, BLOCK)
    batch_head = tl.program_id(0) // num_blocks
    first_row = (tl.program_id(0) % num_blocks) * BLOCK
    return first_row, batch_head // num_heads, batch_head % num_heads, batch_head.to(tl.int64)


# A program takes its streamed rows in two parts: whole blocks, of which all rows exist, and a rest,
# in smaller blocks that are masked. How many rows there are decides which of the parts there are.


@triton.jit
def end_of_blocks(end, BLOCK: tl.constexpr, HAS_BLOCKS: tl.constexpr):
    """Where the whole blocks end and the rest begins."""
    return end // BLOCK * BLOCK if HAS_BLOCKS else end * 0


@triton.jit
def which_exist(rows, end, ALL_EXIST: tl.constexpr):
    """Which rows lie before the end; there is nothing to ask where all do."""
    return tl.full(rows.shape, True, tl.int1) if ALL_EXIST else rows < end


# Under causality query i attends to the keys j <= i alone.


@triton.jit
def end_of_keys(
    first_query,
    num_keys,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Where the keys end, or their blocks, that some query of a block may see."""
    if IS_CAUSAL:
        blocks = tl.cdiv(first_query + BLOCK_QUERY, BLOCK_KEY)
        num_keys = tl.minimum(num_keys, blocks * BLOCK_KEY)
    return num_keys


@triton.jit
def start_of_queries(first_key, BLOCK_QUERY: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Where the blocks of queries begin that may see some key of a block."""
    if IS_CAUSAL:
        return first_key // BLOCK_QUERY * BLOCK_QUERY
    else:
        return first_key * 0  # a run-time number too, as loop_bound takes it


@triton.jit
def hide_later_keys(scores, queries, keys, IS_CAUSAL: tl.constexpr):
    """Scores, or exponents, -inf where the query must not see the key."""
    if IS_CAUSAL:
        scores = tl.where(keys > queries, float("-inf"), scores)
    return scores


@triton.jit
def head_pointer(pointer, batch, head, strides, STRIDE_UNIT: tl.constexpr):
    """The first element of a head of an image; ``strides`` are those of batch, head and row."""
    offset = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return pointer + tl.multiple_of(offset, STRIDE_UNIT)


@triton.jit
def load_columns(
    pointer,
    rows,
    keep,
    row_stride,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Columns FIRST to FIRST + COUNT of some rows; 0 where a row is not kept or past HEAD_DIM."""
    columns = FIRST + tl.arange(0, COUNT)
    offsets = rows.to(tl.int64) * row_stride
    if STRIDE_UNIT > 1:  # without the hint a head_dim such as 72 would be read by twos of bytes
        offsets = tl.multiple_of(offsets, STRIDE_UNIT)
    mask = keep[:, None]
    if FIRST + COUNT > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_columns(
    pointer,
    rows,
    keep,
    tile,
    row_stride,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Write columns FIRST to FIRST + COUNT of some rows."""
    columns = FIRST + tl.arange(0, COUNT)
    offsets = rows.to(tl.int64) * row_stride
    if STRIDE_UNIT > 1:  # as where they are read
        offsets = tl.multiple_of(offsets, STRIDE_UNIT)
    mask = keep[:, None]
    if FIRST + COUNT > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    values = narrow(tile, pointer.dtype.element_ty)
    tl.store(pointer + offsets[:, None] + columns[None, :], values, mask=mask)


# Rows of a head are pairs (main, tail) of tiles, MAIN and TAIL columns wide; see split_head_dim.
# Where TAIL is 0 the second of a pair is never looked at.


@triton.jit
def load_rows(
    pointer,
    rows,
    keep,
    row_stride,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Some rows of a head; 0 where a row is not kept."""
    main = load_columns(pointer, rows, keep, row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
    tail = main
    if TAIL > 0:
        tail = load_columns(pointer, rows, keep, row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT)
    return main, tail


@triton.jit
def store_rows(
    pointer,
    rows,
    keep,
    tiles,
    row_stride,
    HEAD_DIM: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Write some rows of a head."""
    MAIN: tl.constexpr = tiles[0].shape[1]
    store_columns(pointer, rows, keep, tiles[0], row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
    if TAIL > 0:
        store_columns(pointer, rows, keep, tiles[1], row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT)


@triton.jit
def zero_rows(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """Sums of rows before the first product is added."""
    main = tl.zeros((ROWS, MAIN), tl.float32)
    tail = main
    if TAIL > 0:
        tail = tl.zeros((ROWS, TAIL), tl.float32)
    return main, tail


@triton.jit
def scale_rows(rows, factor, TAIL: tl.constexpr):
    """Every row times its own factor, or all times one."""
    main = rows[0] * factor
    tail = main
    if TAIL > 0:
        tail = rows[1] * factor
    return main, tail


@triton.jit
def dot_transposed(left, right, TAIL: tl.constexpr):
    """Scalar products of every row on the left with every row on the right."""
    total = tl.zeros((left[0].shape[0], right[0].shape[0]), tl.float32)
    total = dot(left[0], tl.trans(right[0]), total)
    if TAIL > 0:
        total = dot(left[1], tl.trans(right[1]), total)
    return total


@triton.jit
def dot_rows(factors, rows, sums, TAIL: tl.constexpr):
    """sums + factors @ rows."""
    main = dot(factors, rows[0], sums[0])
    tail = main
    if TAIL > 0:
        tail = dot(factors, rows[1], sums[1])
    return main, tail


@triton.jit
def online_softmax_update(scores, maximum, total):
    """Take a block of base-2 scores into every row's softmax.

    Returns the block's exponentials and the correction that earlier ones need, both relative to the
    new maximum, then the new maximum and the new total.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # While nothing was attended to, -inf - -inf would be NaN where exp must give 0.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    exponentials = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    total = total * correction + tl.sum(exponentials, 1)
    return exponentials, correction, new_maximum, total


@triton.jit
def softmax_end(maximum, total):
    """Divisor of every row's sums, and its log-sum-exp; -inf for a row that attends to nothing."""
    is_empty = total == 0.0
    divisor = tl.where(is_empty, 1.0, total)
    log_sum_exp = tl.where(is_empty, float("-inf"), (maximum + tl.log2(divisor)) * LN_2)
    return divisor, log_sum_exp


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


def row_programs(rows: Tensor, block: int) -> tuple[int]:
    """The grid with a program for each block of rows of each head of (B, H, L, d)."""
    batch, num_heads, length, _ = rows.shape
    return (triton.cdiv(length, block) * batch * num_heads,)


def strides_of(rows: Tensor) -> tuple[int, ...]:
    """The strides of batch, head and row."""
    return rows.stride()[:-1]


def head_constants(*tensors: Tensor) -> dict[str, int]:
    """The constants with which kernels read the rows of all these tensors, (B, H, L, d)."""
    head_dim = tensors[0].shape[-1]
    main, tail = split_head_dim(head_dim)
    return {
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": tail,
        "STRIDE_UNIT": stride_unit(*tensors),
    }


@functools.cache
def _capability_of_index(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_capability(device: torch.device) -> tuple[int, int]:
    return _capability_of_index(device.index) if device.type == "cuda" else (8, 0)
