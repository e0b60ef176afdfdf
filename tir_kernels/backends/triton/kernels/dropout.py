"""Dropout from counted random numbers; ``csrc/include/tir/adapters.h`` says which they are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from .tiles import narrow

_BLOCK = 256


@triton.jit
def bits_of(SLOT: tl.constexpr, word_0, word_1, word_2, word_3):
    """The 16 bits that decide about the channel in one of the 8 slots of a draw."""
    if SLOT // 2 == 0:
        word = word_0
    elif SLOT // 2 == 1:
        word = word_1
    elif SLOT // 2 == 2:
        word = word_2
    else:
        word = word_3
    return ((word >> (16 * (SLOT % 2))) & 0xFFFF).to(tl.int32)


@triton.jit
def _write_kept(
    rows_ptr, output_ptr, source, target, channel, exists, num_channels, bits, threshold, scale
):
    is_written = exists & (channel < num_channels)
    value = tl.load(rows_ptr + source + channel, mask=is_written, other=0.0).to(tl.float32)
    kept = tl.where(bits >= threshold, value * scale, 0.0)
    kept = narrow(kept, output_ptr.dtype.element_ty)
    tl.store(output_ptr + target + channel, kept, mask=is_written)


@triton.jit(do_not_specialize=["num_rows", "group_rows", "place", "threshold"])
def philox_dropout_kernel(
    rows_ptr,  # [G, S, T, D]
    seeds_ptr,  # [G] int64
    step_ptr,  # [1] int64
    output_ptr,  # [G, K, S, T, D]
    num_rows,  # G S T
    group_rows,  # S T
    length,
    num_channels,
    num_blocks,
    num_branches,
    place,  # stream << 24 | first branch << 16
    threshold,
    scale,
    BLOCK: tl.constexpr,
):
    # A lane draws once, for 8 channels that lie num_blocks apart.
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    branch = tl.program_id(1)
    row, block = lane // num_blocks, lane % num_blocks
    exists = row < num_rows
    group, row_of_group = row // group_rows, row % group_rows
    sequence, position = row_of_group // length, row_of_group % length
    seed = tl.load(seeds_ptr + group, mask=exists, other=0)
    step = tl.load(step_ptr)
    first = (block | (place + (branch << 16)).to(tl.int64)).to(tl.uint32)
    second, third = position.to(tl.uint32), sequence.to(tl.uint32)
    fourth = (third ^ third) + step.to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, first, second, third, fourth)
    source = row * num_channels
    target = ((group * num_branches + branch) * group_rows + row_of_group) * num_channels
    for slot in tl.static_range(8):
        bits = bits_of(slot, word_0, word_1, word_2, word_3)
        channel = slot * num_blocks + block
        _write_kept(
            rows_ptr, output_ptr, source, target, channel, exists, num_channels,
            bits, threshold, scale,
        )  # fmt: skip


def philox_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    stream: int,
    first_branch: int,
    threshold: int,
    scale: float,
    output: Tensor,
) -> None:
    _, branches, sequences, length, num_channels = output.shape
    num_rows, num_blocks = rows.numel() // num_channels, triton.cdiv(num_channels, 8)
    grid = (triton.cdiv(num_rows * num_blocks, _BLOCK), branches)
    with device_guard(rows.device):
        philox_dropout_kernel[grid](
            rows,
            seeds.contiguous(),
            step,
            output,
            num_rows,
            sequences * length,
            length,
            num_channels,
            num_blocks,
            branches,
            stream << 24 | first_branch << 16,
            threshold,
            scale,
            BLOCK=_BLOCK,
        )
