"""Logarithms of the keys' weights, taken once.

Attention adds them to its scores. Its kernels would take them in every program, in each of its
passes over a block of keys, and in all the lanes that hold scores of a key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from .tiles import which_exist

BLOCK = 256
# Below this the hardware's logarithm sees 0. NaN is not below it: it stays, and shows.
SMALLEST_WEIGHT = tl.constexpr(1.1754943508222875e-38)


@triton.jit(do_not_specialize=["number"])
def log_weights_kernel(
    weights_ptr,  # [B, L]
    log_weights_ptr,  # [B, L]
    number,  # B times L
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = places < number
    weights = tl.load(weights_ptr + places, mask=exists, other=0.0)
    is_attended = (weights < SMALLEST_WEIGHT) == 0
    logarithms = tl.log2(tl.where(is_attended, weights, 1.0))
    tl.store(log_weights_ptr + places, tl.where(is_attended, logarithms, float("-inf")), exists)


def log_weights(weights: Tensor | None) -> Tensor | None:
    """Base-2 logarithms, (B, L), -inf for weights that count as 0.

    Args:
        weights: (B, L) float32, or None for weights of 1, of which kernels read no logarithms.
    """
    if weights is None:
        return None
    weights = weights.contiguous()
    result = torch.empty_like(weights)
    with device_guard(weights.device):
        log_weights_kernel[(triton.cdiv(weights.numel(), BLOCK),)](
            weights, result, weights.numel(), BLOCK=BLOCK, num_warps=4
        )
    return result


@triton.jit
def load_log_weights(log_weights_ptr, keys, end, ALL_EXIST: tl.constexpr):
    """The logarithms of the weights of some keys, and whether each is attended to.

    From ``end`` on there are no keys: their logarithms are -inf. Without weights those of keys are
    0, which is added as it is where weights of 1 are given: the sums are the same to the bit.
    """
    exist = which_exist(keys, end, ALL_EXIST)
    if log_weights_ptr is None:
        attended = exist
        logarithms = tl.where(exist, 0.0, float("-inf"))
    else:
        logarithms = tl.load(log_weights_ptr + keys, mask=exist, other=float("-inf"))
        attended = logarithms != float("-inf")
    return logarithms, attended
