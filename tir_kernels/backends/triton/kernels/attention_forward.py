"""Weighted attention, forward: A[i, j] = w[j] exp(s[i, j]) / sum_j w[j] exp(s[i, j]).

A weight is added to the scores as its logarithm, so a key of weight 0 has a score of -inf. One
program computes a block of query rows of one head and walks over the keys with an online softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from ..configs import forward_config, split_width
from .tiles import (
    LN_2,
    LOG2_E,
    device_capability,
    dot,
    head_offset,
    load_key_weights,
    load_rows,
    loop_end,
    narrow,
    store_rows,
    stride_unit,
)


@triton.jit(do_not_specialize=["num_heads", "length"])
def attention_forward_kernel(
    query_ptr,  # [B, H, L, d]
    key_ptr,  # [B, H, L, d]
    value_ptr,  # [B, H, L, d]
    weights_ptr,  # [B, L]
    output_ptr,  # [B, H, L, d], contiguous
    log_sum_exp_ptr,  # [B, H, L]
    query_batch_stride,
    query_head_stride,
    query_row_stride,
    key_batch_stride,
    key_head_stride,
    key_row_stride,
    value_batch_stride,
    value_head_stride,
    value_row_stride,
    num_heads,
    length,
    scale_log2,  # scale times log2(e): exponentials are powers of two
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
):
    num_blocks = tl.cdiv(length, BLOCK_QUERY)
    batch_head = tl.program_id(0) // num_blocks
    batch = batch_head // num_heads
    head = batch_head % num_heads
    query_ptr += head_offset(batch, head, query_batch_stride, query_head_stride, STRIDE_UNIT)
    key_ptr += head_offset(batch, head, key_batch_stride, key_head_stride, STRIDE_UNIT)
    value_ptr += head_offset(batch, head, value_batch_stride, value_head_stride, STRIDE_UNIT)
    weights_ptr += batch.to(tl.int64) * length
    first_row = batch_head.to(tl.int64) * length

    rows = (tl.program_id(0) % num_blocks) * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    in_range = rows < length
    query = load_rows(query_ptr, rows, in_range, query_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
    output = tl.zeros((BLOCK_QUERY, MAIN), tl.float32)
    if TAIL > 0:
        query_tail = load_rows(
            query_ptr, rows, in_range, query_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
        )
        output_tail = tl.zeros((BLOCK_QUERY, TAIL), tl.float32)
    maximum = tl.full((BLOCK_QUERY,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERY,), tl.float32)

    for first_key in range(0, loop_end(length), BLOCK_KEY):
        keys = first_key + tl.arange(0, BLOCK_KEY)
        # Keys and values that are not attended to are never read: not even their NaN gets out.
        _, attended, log_weights = load_key_weights(weights_ptr, keys, length)
        bias = tl.where(attended, log_weights, float("-inf"))
        key = load_rows(key_ptr, keys, attended, key_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
        scores = tl.zeros((BLOCK_QUERY, BLOCK_KEY), tl.float32)
        scores = dot(query, tl.trans(key), scores)
        if TAIL > 0:
            key_tail = load_rows(
                key_ptr, keys, attended, key_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
            )
            scores = dot(query_tail, tl.trans(key_tail), scores)
        scores = scores * scale_log2 + bias[None, :]

        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # While nothing was attended to, -inf - -inf would be NaN where exp must give 0.
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        exponentials = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(maximum - shift)
        total = total * correction + tl.sum(exponentials, 1)
        maximum = new_maximum

        value = load_rows(
            value_ptr, keys, attended, value_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT
        )
        exponentials = narrow(exponentials, value.dtype)
        output = dot(exponentials, value, output * correction[:, None])
        if TAIL > 0:
            value_tail = load_rows(
                value_ptr, keys, attended, value_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
            )
            output_tail = dot(exponentials, value_tail, output_tail * correction[:, None])

    is_empty = total == 0.0
    divisor = tl.where(is_empty, 1.0, total)
    log_sum_exp = tl.where(is_empty, float("-inf"), (maximum + tl.log2(divisor)) * LN_2)
    tl.store(log_sum_exp_ptr + first_row + rows, log_sum_exp, mask=in_range)
    output_ptr += first_row * HEAD_DIM
    output = output / divisor[:, None]
    store_rows(output_ptr, rows, in_range, output, 0, MAIN, HEAD_DIM)
    if TAIL > 0:
        output_tail = output_tail / divisor[:, None]
        store_rows(output_ptr, rows, in_range, output_tail, MAIN, TAIL, HEAD_DIM)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(B, H, L, d) three times and (B, L) -> output (B, H, L, d), log-sum-exp (B, H, L)."""
    batch, num_heads, length, head_dim = query.shape
    main, tail = split_width(head_dim)
    config = forward_config(device_capability(query.device), query.dtype, head_dim, length)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sum_exp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    num_programs = triton.cdiv(length, config.block_held) * batch * num_heads
    with device_guard(query.device):
        attention_forward_kernel[(num_programs,)](
            query,
            key,
            value,
            weights.contiguous(),
            output,
            log_sum_exp,
            *query.stride()[:-1],
            *key.stride()[:-1],
            *value.stride()[:-1],
            num_heads,
            length,
            scale * LOG2_E.value,
            HEAD_DIM=head_dim,
            MAIN=main,
            TAIL=tail,
            STRIDE_UNIT=stride_unit(query, key, value),
            BLOCK_QUERY=config.block_held,
            BLOCK_KEY=config.block_step,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return output, log_sum_exp
