"""Products with rows that are dropped as they are read; csrc/include/tir/adapters.h says how."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from ...optional import DropoutInputs
from .dropout import bits_of
from .tiles import dot, loop_bound, narrow

MAX_RANK = 64  # wider factors would not stay in registers
_BLOCKS = 32  # of 8 channels each
_LARGEST_SPLIT = 512  # rows whose gradients one program adds up


@triton.jit
def _words(seed, step, place, block, rows, length, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Four words of random numbers for each row and block of 8 channels."""
    zeros = tl.zeros((ROWS, BLOCKS), tl.uint32)
    first = zeros + (block.to(tl.int64) | place.to(tl.int64)).to(tl.uint32)[None, :]
    second = zeros + (rows % length).to(tl.uint32)[:, None]
    third = zeros + (rows // length).to(tl.uint32)[:, None]
    return tl.philox(seed, first, second, third, zeros + step.to(tl.uint32))


@triton.jit
def _kept(rows_ptr, first, rows, num_rows, channel, exists, width, bits, threshold, scale):
    """(rows, channels) of the tokens as dropout leaves them, in their type."""
    is_read = (rows < num_rows)[:, None] & exists[None, :]
    places = first + rows.to(tl.int64)[:, None] * width + channel[None, :]
    value = tl.load(rows_ptr + places, mask=is_read, other=0.0).to(tl.float32)
    kept = tl.where(bits >= threshold, value * scale, 0.0)
    return narrow(kept, rows_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["num_rows", "length", "place", "threshold"])
def dropped_product_kernel(
    rows_ptr,  # [G, S, T, D]
    seeds_ptr,  # [G] int64
    step_ptr,  # [1] int64
    factor_ptr,  # [G, K, rank, D]
    output_ptr,  # [G, K, S T, rank]
    num_rows,  # S T
    length,  # T
    width,  # D
    num_blocks,
    num_branches,  # K
    rank,
    place,  # stream << 24 | first branch << 16
    threshold,
    scale,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    branch, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    seed, step = tl.load(seeds_ptr + group), tl.load(step_ptr)
    own = group * num_branches + branch
    column = tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first_block in range(0, loop_bound(num_blocks), BLOCKS):
        block = first_block + tl.arange(0, BLOCKS)
        word_0, word_1, word_2, word_3 = _words(
            seed, step, place + (branch << 16), block, rows, length, ROWS, BLOCKS
        )
        for slot in tl.static_range(8):
            channel = slot * num_blocks + block
            exists = (block < num_blocks) & (channel < width)
            kept = _kept(
                rows_ptr, group * num_rows * width, rows, num_rows, channel, exists, width,
                bits_of(slot, word_0, word_1, word_2, word_3), threshold, scale,
            )  # fmt: skip
            places = (own * rank + column[None, :]) * width + channel[:, None]
            is_read = exists[:, None] & (column < rank)[None, :]
            factor = tl.load(factor_ptr + places, mask=is_read, other=0.0)
            total = dot(kept, factor, total)
    places = (own * num_rows + rows[:, None]) * rank + column[None, :]
    is_written = (rows < num_rows)[:, None] & (column < rank)[None, :]
    tl.store(output_ptr + places, narrow(total, output_ptr.dtype.element_ty), mask=is_written)


@triton.jit
def _add_slot(
    total, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
    word_0, word_1, word_2, word_3, threshold, scale, SLOT: tl.constexpr,
):  # fmt: skip
    channel = SLOT * num_blocks + block
    exists = (block < num_blocks) & (channel < width)
    bits = bits_of(SLOT, word_0, word_1, word_2, word_3)
    kept = _kept(rows_ptr, first, rows, num_rows, channel, exists, width, bits, threshold, scale)
    return dot(left, kept, total)


@triton.jit
def _store_slot(
    total, output_ptr, first, rank, column, block, num_blocks, width, SLOT: tl.constexpr
):
    channel = SLOT * num_blocks + block
    exists = (block < num_blocks) & (channel < width)
    places = first + column.to(tl.int64)[:, None] * width + channel[None, :]
    is_written = (column < rank)[:, None] & exists[None, :]
    tl.store(output_ptr + places, narrow(total, output_ptr.dtype.element_ty), mask=is_written)


@triton.jit(do_not_specialize=["num_rows", "length", "place", "threshold", "split_rows"])
def factor_gradient_kernel(
    rows_ptr,  # [G, S, T, D]
    seeds_ptr,  # [G] int64
    step_ptr,  # [1] int64
    grad_ptr,  # [G, K, S T, rank]
    output_ptr,  # [splits, G, K, rank, D]
    num_rows,
    length,
    width,
    num_blocks,
    num_branches,
    rank,
    place,
    threshold,
    scale,
    split_rows,  # of a program, a multiple of ROWS
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
):
    tiles = tl.cdiv(num_blocks, BLOCKS)
    block = (tl.program_id(0) % tiles) * BLOCKS + tl.arange(0, BLOCKS)
    split = tl.program_id(0) // tiles
    branch, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    seed, step = tl.load(seeds_ptr + group), tl.load(step_ptr)
    own = group * num_branches + branch
    first = group * num_rows * width
    column = tl.arange(0, RANK)
    total_0 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_1 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_2 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_3 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_4 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_5 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_6 = tl.zeros((RANK, BLOCKS), tl.float32)
    total_7 = tl.zeros((RANK, BLOCKS), tl.float32)
    for offset in range(0, loop_bound(split_rows), ROWS):
        rows = split * split_rows + offset + tl.arange(0, ROWS)
        word_0, word_1, word_2, word_3 = _words(
            seed, step, place + (branch << 16), block, rows, length, ROWS, BLOCKS
        )
        places = (own * num_rows + rows[None, :]) * rank + column[:, None]
        is_read = (rows < num_rows)[None, :] & (column < rank)[:, None]
        left = tl.load(grad_ptr + places, mask=is_read, other=0.0)
        total_0 = _add_slot(
            total_0, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 0,
        )  # fmt: skip
        total_1 = _add_slot(
            total_1, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 1,
        )  # fmt: skip
        total_2 = _add_slot(
            total_2, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 2,
        )  # fmt: skip
        total_3 = _add_slot(
            total_3, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 3,
        )  # fmt: skip
        total_4 = _add_slot(
            total_4, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 4,
        )  # fmt: skip
        total_5 = _add_slot(
            total_5, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 5,
        )  # fmt: skip
        total_6 = _add_slot(
            total_6, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 6,
        )  # fmt: skip
        total_7 = _add_slot(
            total_7, left, rows_ptr, first, rows, num_rows, block, num_blocks, width,
            word_0, word_1, word_2, word_3, threshold, scale, 7,
        )  # fmt: skip
    at = (split.to(tl.int64) * tl.num_programs(2) * num_branches + own) * rank * width
    _store_slot(total_0, output_ptr, at, rank, column, block, num_blocks, width, 0)
    _store_slot(total_1, output_ptr, at, rank, column, block, num_blocks, width, 1)
    _store_slot(total_2, output_ptr, at, rank, column, block, num_blocks, width, 2)
    _store_slot(total_3, output_ptr, at, rank, column, block, num_blocks, width, 3)
    _store_slot(total_4, output_ptr, at, rank, column, block, num_blocks, width, 4)
    _store_slot(total_5, output_ptr, at, rank, column, block, num_blocks, width, 5)
    _store_slot(total_6, output_ptr, at, rank, column, block, num_blocks, width, 6)
    _store_slot(total_7, output_ptr, at, rank, column, block, num_blocks, width, 7)


@triton.jit
def add_splits_kernel(parts_ptr, output_ptr, count, num_splits, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, loop_bound(num_splits)):
        total += tl.load(parts_ptr + split * count + place, mask=place < count, other=0.0)
    total = narrow(total, output_ptr.dtype.element_ty)
    tl.store(output_ptr + place, total, mask=place < count)


def dropped_product(inputs: DropoutInputs, factor: Tensor, output: Tensor) -> None:
    """Fill ``output`` (G, K, S T, rank) with the product of dropped rows and (G, K, rank, D)."""
    groups, branches, num_rows, rank = output.shape
    tile = _tile(num_rows, output.dtype)
    with device_guard(factor.device):
        dropped_product_kernel[(triton.cdiv(num_rows, tile), branches, groups)](
            *inputs[:3], factor, output, *_numbers(inputs, num_rows, branches, rank),
            ROWS=tile, BLOCKS=_BLOCKS, RANK=_padded(rank),
        )  # fmt: skip


def factor_gradient(inputs: DropoutInputs, grad: Tensor, output: Tensor) -> None:
    """Fill ``output`` (G, K, rank, D) with ``grad^T`` (G, K, rank, S T) times dropped rows.

    Parts of the rows are added in a fixed order.
    """
    groups, branches, num_rows, rank = grad.shape
    tile = _tile(num_rows, output.dtype)
    splits = triton.cdiv(num_rows, _LARGEST_SPLIT)
    split_rows = triton.cdiv(triton.cdiv(num_rows, splits), tile) * tile
    parts = output
    if splits > 1:
        parts = torch.empty((splits, *output.shape), dtype=torch.float32, device=output.device)
    tiles = triton.cdiv(triton.cdiv(output.shape[-1], 8), _BLOCKS)
    with device_guard(output.device):
        factor_gradient_kernel[(tiles * splits, branches, groups)](
            *inputs[:3], grad, parts, *_numbers(inputs, num_rows, branches, rank), split_rows,
            ROWS=tile, BLOCKS=_BLOCKS, RANK=_padded(rank),
        )  # fmt: skip
        if splits > 1:
            count = output.numel()
            add_splits_kernel[(triton.cdiv(count, 1024),)](parts, output, count, splits, BLOCK=1024)


def _numbers(inputs: DropoutInputs, num_rows: int, branches: int, rank: int) -> tuple[Any, ...]:
    """The numbers that both kernels take, in order."""
    length, width = inputs.rows.shape[-2:]
    place = inputs.stream << 24 | inputs.first_branch << 16
    sizes = num_rows, length, width, triton.cdiv(width, 8), branches, rank
    return (*sizes, place, inputs.threshold, inputs.scale)


def _tile(num_rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile: few where there are few, so that more programs share them.

    And few of float32, whose products are made of registers.
    """
    return 64 if num_rows >= 1024 and dtype != torch.float32 else 16


def _padded(rank: int) -> int:
    """A tensor core multiplies by sixteens."""
    return max(16, triton.next_power_of_2(rank))
