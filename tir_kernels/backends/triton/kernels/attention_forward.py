"""Weighted attention, forward: A[i, j] = w[j] exp(s[i, j]) / sum_j w[j] exp(s[i, j]).

A weight is added to the scores as its logarithm, so a key of weight 0 has a score of -inf. One
program computes a block of query rows of one head and walks over the keys with an online softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard, empty_result
from ...inputs import AttentionInputs
from ..configs import cut, forward_config
from .key_weights import load_log_weights, log_weights
from .tiles import (
    LOG2_E,
    device_capability,
    dot_rows,
    dot_transposed,
    end_of_blocks,
    end_of_keys,
    head_constants,
    head_pointer,
    hide_later_keys,
    load_rows,
    locate_rows,
    loop_bound,
    narrow,
    online_softmax_update,
    row_programs,
    scale_rows,
    softmax_end,
    store_rows,
    strides_of,
    zero_rows,
)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def attention_forward_kernel(
    query_ptr,  # [B, H, Lq, d]
    key_ptr,  # [B, H, L, d]
    value_ptr,  # [B, H, L, d]
    log_weights_ptr,  # [B, L]; None: all are 0
    output_ptr,  # [B, H, Lq, d]
    log_sum_exp_ptr,  # [B, H, Lq]
    query_strides,  # of batch, head and row
    key_strides,
    value_strides,
    output_strides,
    num_heads,
    num_queries,
    num_keys,
    scale_log2,  # scale times log2(e): exponentials are powers of two
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    first_query, batch, head, head_number = locate_rows(num_heads, num_queries, BLOCK_QUERY)
    query_ptr = head_pointer(query_ptr, batch, head, query_strides, STRIDE_UNIT)
    key_ptr = head_pointer(key_ptr, batch, head, key_strides, STRIDE_UNIT)
    value_ptr = head_pointer(value_ptr, batch, head, value_strides, STRIDE_UNIT)
    if log_weights_ptr is not None:
        log_weights_ptr += batch.to(tl.int64) * num_keys
    first_row = head_number * num_queries

    rows = first_query + tl.arange(0, BLOCK_QUERY)
    in_range = rows < num_queries
    query = load_rows(
        query_ptr, rows, in_range, query_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
    )
    output = zero_rows(BLOCK_QUERY, MAIN, TAIL)
    maximum = tl.full((BLOCK_QUERY,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERY,), tl.float32)

    end = end_of_keys(first_query, num_keys, BLOCK_QUERY, BLOCK_KEY, IS_CAUSAL)
    whole = end_of_blocks(end, BLOCK_KEY, HAS_BLOCKS)
    for is_rest in tl.static_range(0 if HAS_BLOCKS else 1, 2 if BLOCK_REST > 0 else 1):
        for first_key in tl.range(
            loop_bound(whole * is_rest),
            loop_bound(end if is_rest else whole),
            BLOCK_REST if is_rest else BLOCK_KEY,
            num_stages=1 if is_rest else None,
        ):
            keys = first_key + tl.arange(0, BLOCK_REST if is_rest else BLOCK_KEY)
            # Keys and values that are not attended to are never read: not even their NaN gets out.
            bias, attended = load_log_weights(log_weights_ptr, keys, end, not is_rest)
            key = load_rows(
                key_ptr, keys, attended, key_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
            )
            scores = dot_transposed(query, key, TAIL) * scale_log2 + bias[None, :]
            scores = hide_later_keys(scores, rows[:, None], keys[None, :], IS_CAUSAL)
            exponentials, correction, maximum, total = online_softmax_update(scores, maximum, total)
            value = load_rows(
                value_ptr, keys, attended, value_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
            )
            output = scale_rows(output, correction[:, None], TAIL)
            output = dot_rows(narrow(exponentials, value[0].dtype), value, output, TAIL)

    divisor, log_sum_exp = softmax_end(maximum, total)
    tl.store(log_sum_exp_ptr + first_row + rows, log_sum_exp, mask=in_range)
    output = (output[0] / divisor[:, None], output[1] / divisor[:, None])
    output_ptr = head_pointer(output_ptr, batch, head, output_strides, STRIDE_UNIT)
    store_rows(output_ptr, rows, in_range, output, output_strides[2], HEAD_DIM, TAIL, STRIDE_UNIT)


def attention_forward(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Output (B, H, Lq, d) and log-sum-exp (B, H, Lq)."""
    query, key, value, weights, scale, is_causal = inputs
    _, num_heads, num_queries, head_dim = query.shape
    config = forward_config(device_capability(query.device), query.dtype, head_dim, num_queries)
    output = empty_result(query)
    log_sum_exp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    with device_guard(query.device):
        attention_forward_kernel[row_programs(query, config.block_stationary)](
            query,
            key,
            value,
            log_weights(weights),
            output,
            log_sum_exp,
            *map(strides_of, (query, key, value, output)),
            num_heads,
            num_queries,
            key.shape[2],
            scale * LOG2_E.value,
            **head_constants(query, key, value, output),
            **config.options(),
            **cut(key.shape[2], config.block_streamed, query.dtype),
            IS_CAUSAL=is_causal,
        )
    return output, log_sum_exp
