"""Exact top-k per class, counts per token, and the weights that belong to the counts.

Relevance becomes an unsigned integer of the same order, and the k-th largest is found bit by bit:
a bit is set in the threshold if at least k keys remain that reach it. Keys above the threshold are
selected, and of those equal to it the first ones, until there are k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from ..configs import next_power_of_two, selection_config
from .tiles import loop_bound


@triton.jit
def order_keys(scores):
    """Unsigned integers in the order of the scores: NaN is 0, below all, and -0 equals +0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    keys = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(scores == scores, keys, 0)


@triton.jit(do_not_specialize=["num_patches", "num_classes", "num_prefix_tokens", "top_k"])
def selection_kernel(
    relevance_ptr,  # [B, C, N]
    table_ptr,  # [C + 1]
    counts_ptr,  # [B, N] int32
    weights_ptr,  # [B, L]
    num_patches,
    num_classes,
    num_prefix_tokens,
    top_k,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_PREFIX: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    relevance_ptr += image * num_classes * num_patches
    patches = tl.arange(0, BLOCK_PATCHES)
    exists = patches < num_patches
    counts = tl.zeros((BLOCK_PATCHES,), tl.int32)
    for first_class in range(0, loop_bound(num_classes), BLOCK_CLASSES):
        classes = first_class + tl.arange(0, BLOCK_CLASSES)
        # Absent tokens rank with NaN and have the highest indices: k tokens are found before them.
        scores = tl.load(
            relevance_ptr + classes.to(tl.int64)[:, None] * num_patches + patches[None, :],
            mask=(classes < num_classes)[:, None] & exists[None, :],
            other=float("nan"),
        )
        keys = order_keys(scores)
        threshold = tl.zeros((BLOCK_CLASSES,), tl.uint32)
        bit = tl.full((BLOCK_CLASSES,), 0x80000000, tl.uint32)
        for _ in range(32):
            candidate = threshold | bit
            reached = tl.sum((keys >= candidate[:, None]).to(tl.int32), 1)
            threshold = tl.where(reached >= top_k, candidate, threshold)
            bit = bit >> 1
        is_above = (keys > threshold[:, None]).to(tl.int32)
        is_equal = (keys == threshold[:, None]).to(tl.int32)
        missing = top_k - tl.sum(is_above, 1)
        is_first = (tl.cumsum(is_equal, 1) <= missing[:, None]).to(tl.int32)
        selected = is_above | (is_equal & is_first)
        counts += tl.sum(tl.where((classes < num_classes)[:, None], selected, 0), 0)

    tl.store(counts_ptr + image * num_patches + patches, counts, mask=exists)
    weights_ptr += image * (num_prefix_tokens + num_patches)
    weights = tl.load(table_ptr + counts, mask=exists, other=0.0)
    tl.store(weights_ptr + num_prefix_tokens + patches, weights, mask=exists)
    prefix = tl.arange(0, BLOCK_PREFIX)
    ones = tl.full((BLOCK_PREFIX,), 1.0, tl.float32)
    tl.store(weights_ptr + prefix, ones, mask=prefix < num_prefix_tokens)


def select_and_weigh(
    relevance: Tensor, table: Tensor, top_k: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """(B, C, N) relevance and (C + 1,) table -> weights (B, L) float32, counts (B, N) int32."""
    batch, num_classes, num_patches = relevance.shape
    config = selection_config(num_patches, num_classes)
    device = relevance.device
    counts = torch.empty((batch, num_patches), dtype=torch.int32, device=device)
    weights = torch.empty(
        (batch, num_prefix_tokens + num_patches), dtype=torch.float32, device=device
    )
    with device_guard(device):
        selection_kernel[(batch,)](
            relevance,
            table.contiguous(),
            counts,
            weights,
            num_patches,
            num_classes,
            num_prefix_tokens,
            top_k,
            BLOCK_PATCHES=config.block_patches,
            BLOCK_CLASSES=config.block_classes,
            BLOCK_PREFIX=next_power_of_two(max(1, num_prefix_tokens)),
            num_warps=config.num_warps,
        )
    return weights, counts
