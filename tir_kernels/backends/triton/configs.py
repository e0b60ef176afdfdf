"""Tile sizes and launch shapes, chosen from what is known before a launch: nothing is tuned at run
time, so that the first call is as fast as the last and the same inputs always run the same code.

Shared memory is what bounds the tiles. Capability 8.x is treated as one family with the 99 KiB of
its smaller members (8.6 and 8.9), which 12.x shares; 9.0 and 10.x have 227 KiB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256
MIN_DOT = 16  # the smallest edge that every tensor-core instruction accepts
# Instructions of a program with 128 queries over those of one with 64, both of four warps, on 9.0
# and for heads of width 64: a warp's pass of 64 keys takes 635 and 377 (595 and 343 unweighted),
# as copies and addresses of keys and values serve twice as many rows. So an even number of 64s is
# taken by 128s, an odd one from 7 on. Wider heads would spill, or need eight warps, which leave a
# multiprocessor with one program; on 10.0 heads of width 64 spill too.
WIDE_COST = 1.7


class AttentionConfig(NamedTuple):
    block_stationary: int  # rows that a program keeps: queries, or keys where it sums up for keys
    block_streamed: int  # rows of the other kind that it takes at a time
    num_warps: int
    num_stages: int

    def options(self, keys_are_stationary: bool = False) -> dict[str, int]:
        """How a kernel is compiled and launched."""
        blocks = self.block_stationary, self.block_streamed
        block_query, block_key = reversed(blocks) if keys_are_stationary else blocks
        return {
            "BLOCK_QUERY": block_query,
            "BLOCK_KEY": block_key,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class RelevanceConfig(NamedTuple):
    block_rows: int
    block_depth: int  # step through the channels of a token
    block_features: int  # joint features computed at once
    block_classes: int
    num_warps: int
    num_stages: int


class SelectionConfig(NamedTuple):
    block_patches: int
    block_classes: int
    num_warps: int


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Powers of two (main, tail) that cover a head_dim; tail is 0 where one tile wastes no more.

    A tile's edge must be a power of two, and padding 80 to 128 would waste three eighths of every
    product; 64 + 16 wastes nothing.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"the triton backend takes heads of width at most {MAX_HEAD_DIM}; got {head_dim}; "
            "use the reference backend"
        )
    whole = max(MIN_DOT, next_power_of_two(head_dim))
    main = whole // 2
    if main >= MIN_DOT:
        tail = max(MIN_DOT, next_power_of_two(head_dim - main))
        if main + tail < whole:
            return main, tail
    return whole, 0


def has_large_shared_memory(capability: tuple[int, int]) -> bool:
    return capability[0] in (9, 10)


def cut(length: int, block: int, dtype: torch.dtype) -> dict[str, int]:
    """How a kernel takes the rows that it streams: whole blocks, then a rest in one smaller block.

    At 197 rows a rest of 16 takes the place of a fourth block of 64. Whole blocks need no masks,
    which are a sixth of their instructions. Every cut is a kernel of its own: there are seven for
    blocks of 64, and a model needs one for each of its lengths.

    In float32 products outweigh masks, and two loops of them spill: all is a rest, in many blocks.
    """
    if dtype == torch.float32:
        return {"HAS_BLOCKS": False, "BLOCK_REST": block}
    rest = length % block
    block_rest = max(MIN_DOT, next_power_of_two(rest)) if rest else 0
    return {"HAS_BLOCKS": length >= block, "BLOCK_REST": block_rest}


def statistics_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, length: int
) -> AttentionConfig:
    columns = sum(split_head_dim(head_dim))
    if dtype == torch.float32:  # no tensor cores: registers are what is scarce
        return AttentionConfig(32 if columns <= 128 else 16, 32, 8, 1)
    if not has_large_shared_memory(capability):
        if columns > 128:
            return AttentionConfig(64, 32, 8, 1)
        return AttentionConfig(64, 64 if columns <= 64 else 32, 4, 2)
    if columns > 128:
        return AttentionConfig(64, 32, 8, 2)
    if length >= 1024:
        return AttentionConfig(128, 64, 8, 2)
    return AttentionConfig(64, 64 if columns <= 96 else 32, 4, 2)


def forward_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, num_queries: int
) -> AttentionConfig:
    columns = sum(split_head_dim(head_dim))
    if has_large_shared_memory(capability) and dtype != torch.float32 and columns <= 128:
        if num_queries <= MIN_DOT:  # four warps share the keys
            return AttentionConfig(MIN_DOT, 64 if columns <= 96 else 32, 4, 2)
        narrow = -(-num_queries // 64)
        wide = -(-narrow // 2)
        if columns <= 64 and wide * WIDE_COST < narrow and capability[0] == 9:
            return AttentionConfig(128, 64, 4, 2)
    return statistics_config(capability, dtype, head_dim, num_queries)


def grad_query_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> AttentionConfig:
    columns, large = sum(split_head_dim(head_dim)), has_large_shared_memory(capability)
    if dtype == torch.float32:
        block = 32 if large or columns <= 128 else 16
        return AttentionConfig(block, block, 8, 1)
    if not large:
        return AttentionConfig(64, 32, 4, 2) if columns <= 128 else AttentionConfig(32, 16, 4, 1)
    return AttentionConfig(64, 64 if columns <= 128 else 32, 4 if columns <= 64 else 8, 2)


def grad_key_value_config(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int
) -> AttentionConfig:
    columns, large = sum(split_head_dim(head_dim)), has_large_shared_memory(capability)
    if dtype == torch.float32:
        return AttentionConfig(32 if large or columns <= 128 else 16, 16, 8, 1)
    if columns > 128:
        return AttentionConfig(32, 64, 8, 2) if large else AttentionConfig(16, 32, 4, 1)
    return AttentionConfig(64, 64 if large else 32, 4 if columns <= 64 else 8, 2)


def relevance_config(
    dtype: torch.dtype, num_images: int, num_patches: int, num_classes: int
) -> RelevanceConfig:
    # Fewer rows a program while 64 would leave most multiprocessors without one.
    block_rows = 64 if num_images * -(-num_patches // 64) >= 128 else 32
    block_classes = min(64 if dtype == torch.float32 else 128, next_power_of_two(num_classes))
    if dtype == torch.float32:
        return RelevanceConfig(block_rows, 32, 64, block_classes, block_rows // 8, 2)
    return RelevanceConfig(block_rows, 64, 128, block_classes, 8, 3 if block_rows == 64 else 2)


def selection_config(num_patches: int, num_classes: int) -> SelectionConfig:
    block_patches = max(MIN_DOT, next_power_of_two(num_patches))
    block_classes = min(next_power_of_two(num_classes), max(1, 2048 // block_patches))
    return SelectionConfig(block_patches, block_classes, min(16, max(4, block_patches // 128)))
