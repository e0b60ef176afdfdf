"""What keys receive of weighted attention and how queries spread theirs, without a matrix of Lq x L
and without atomics.

The first kernel has stationary queries and streamed keys: it finds the softmax and the entropy of
each query. The second has stationary keys and streamed queries: with the maxima and totals of the
first it finds the probabilities again and adds up what each key receives. Those two numbers serve
better than the log-sum-exp, of which a rounding step is a larger part of a probability the further
it lies from 0. Both kernels multiply tiles of the same shape, so that their scores are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import device_guard
from ...inputs import StatisticsInputs
from ...protocol import AttentionStatistics
from ..configs import statistics_config
from .key_weights import load_log_weights, log_weights
from .tiles import (
    LN_2,
    LOG2_E,
    device_capability,
    dot_transposed,
    end_of_keys,
    head_constants,
    head_pointer,
    hide_later_keys,
    load_rows,
    locate_rows,
    loop_bound,
    online_softmax_update,
    row_programs,
    softmax_end,
    start_of_queries,
)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def row_statistics_kernel(
    query_ptr,  # [B, H, Lq, d]
    key_ptr,  # [B, H, L, d]
    log_weights_ptr,  # [B, L]; None: all are 0
    entropy_ptr,  # [B, H, Lq]
    log_sum_exp_ptr,  # [B, H, Lq]
    maximum_ptr,  # [B, H, Lq]
    total_ptr,  # [B, H, Lq]
    query_strides,  # of batch, head and row
    key_strides,
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
    IS_CAUSAL: tl.constexpr,
):
    first_query, batch, head, head_number = locate_rows(num_heads, num_queries, BLOCK_QUERY)
    query_ptr = head_pointer(query_ptr, batch, head, query_strides, STRIDE_UNIT)
    key_ptr = head_pointer(key_ptr, batch, head, key_strides, STRIDE_UNIT)
    if log_weights_ptr is not None:
        log_weights_ptr += batch.to(tl.int64) * num_keys
    first_row = head_number * num_queries

    rows = first_query + tl.arange(0, BLOCK_QUERY)
    in_range = rows < num_queries
    query = load_rows(
        query_ptr, rows, in_range, query_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
    )
    maximum = tl.full((BLOCK_QUERY,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERY,), tl.float32)
    # Sum of the exponentials times (maximum - score). The entropy, log2(total) + deficit / total,
    # is made of two numbers that are never negative: nothing cancels where one key has nearly all.
    deficit = tl.zeros((BLOCK_QUERY,), tl.float32)

    end = end_of_keys(first_query, num_keys, BLOCK_QUERY, BLOCK_KEY, IS_CAUSAL)
    for first_key in range(0, loop_bound(end), BLOCK_KEY):
        keys = first_key + tl.arange(0, BLOCK_KEY)
        bias, attended = load_log_weights(log_weights_ptr, keys, end, ALL_EXIST=False)
        key = load_rows(key_ptr, keys, attended, key_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT)
        scores = dot_transposed(query, key, TAIL) * scale_log2 + bias[None, :]
        scores = hide_later_keys(scores, rows[:, None], keys[None, :], IS_CAUSAL)
        before, total_before = maximum, total
        exponentials, correction, maximum, total = online_softmax_update(scores, maximum, total)
        # What counts no more may be infinitely far below.
        raised = (deficit + (maximum - before) * total_before) * correction
        deficit = tl.where(correction == 0.0, 0.0, raised)
        deficits = exponentials * (maximum[:, None] - scores)
        deficit += tl.sum(tl.where(exponentials == 0.0, 0.0, deficits), 1)

    divisor, log_sum_exp = softmax_end(maximum, total)
    entropy = (tl.log2(divisor) + deficit / divisor) * LN_2
    tl.store(entropy_ptr + first_row + rows, entropy, mask=in_range)
    tl.store(log_sum_exp_ptr + first_row + rows, log_sum_exp, mask=in_range)
    # Of a query that attends to nothing all powers 2^(score - maximum) shall be 0.
    maximum = tl.where(total == 0.0, float("inf"), maximum)
    tl.store(maximum_ptr + first_row + rows, maximum, mask=in_range)
    tl.store(total_ptr + first_row + rows, divisor, mask=in_range)


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys", "num_prefix_tokens"])
def column_statistics_kernel(
    query_ptr,  # [B, H, Lq, d]
    key_ptr,  # [B, H, L, d]
    log_weights_ptr,  # [B, L]; None: all are 0
    maximum_ptr,  # [B, H, Lq]
    total_ptr,  # [B, H, Lq]
    from_prefix_ptr,  # [B, H, L]
    from_patches_ptr,  # [B, H, L]
    query_strides,  # of batch, head and row
    key_strides,
    num_heads,
    num_queries,
    num_keys,
    num_prefix_tokens,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    first_key, batch, head, head_number = locate_rows(num_heads, num_keys, BLOCK_KEY)
    query_ptr = head_pointer(query_ptr, batch, head, query_strides, STRIDE_UNIT)
    key_ptr = head_pointer(key_ptr, batch, head, key_strides, STRIDE_UNIT)
    if log_weights_ptr is not None:
        log_weights_ptr += batch.to(tl.int64) * num_keys
    first_row = head_number * num_queries

    keys = first_key + tl.arange(0, BLOCK_KEY)
    bias, attended = load_log_weights(log_weights_ptr, keys, num_keys, ALL_EXIST=False)
    key = load_rows(key_ptr, keys, attended, key_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT)
    # Sums over the queries at the same place of their blocks; warps exchange them once, at the end.
    from_prefix = tl.zeros((BLOCK_QUERY, BLOCK_KEY), tl.float32)
    from_patches = tl.zeros((BLOCK_QUERY, BLOCK_KEY), tl.float32)

    start = start_of_queries(first_key, BLOCK_QUERY, IS_CAUSAL)
    for first_query in range(loop_bound(start), loop_bound(num_queries), BLOCK_QUERY):
        rows = first_query + tl.arange(0, BLOCK_QUERY)
        row_exists = rows < num_queries
        query = load_rows(
            query_ptr, rows, row_exists, query_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
        )
        maximum = tl.load(maximum_ptr + first_row + rows, mask=row_exists, other=float("inf"))
        total = tl.load(total_ptr + first_row + rows, mask=row_exists, other=1.0)
        scores = dot_transposed(query, key, TAIL) * scale_log2 + bias[None, :]
        scores = hide_later_keys(scores, rows[:, None], keys[None, :], IS_CAUSAL)
        probabilities = tl.exp2(scores - maximum[:, None]) * (1.0 / total)[:, None]
        is_prefix = (rows < num_prefix_tokens)[:, None]
        from_prefix += tl.where(is_prefix, probabilities, 0.0)
        from_patches += tl.where(is_prefix, 0.0, probabilities)

    # A mean over no queries is 0, and not even their NaN gets to a key that is not attended to.
    mean_of_prefix = tl.sum(from_prefix, 0) / tl.maximum(num_prefix_tokens, 1)
    mean_of_patches = tl.sum(from_patches, 0) / tl.maximum(num_queries - num_prefix_tokens, 1)
    mean_of_prefix = tl.where(attended, mean_of_prefix, 0.0)
    mean_of_patches = tl.where(attended, mean_of_patches, 0.0)
    in_range = keys < num_keys
    places = head_number * num_keys + keys
    tl.store(from_prefix_ptr + places, mean_of_prefix, mask=in_range)
    tl.store(from_patches_ptr + places, mean_of_patches, mask=in_range)


def attention_statistics(inputs: StatisticsInputs) -> AttentionStatistics:
    """Four results in float32: (B, H, L) by the key twice, (B, H, Lq) by the query twice."""
    query, key, weights, scale, num_prefix_tokens, is_causal = inputs
    _, num_heads, num_queries, head_dim = query.shape
    config = statistics_config(device_capability(query.device), query.dtype, head_dim, num_queries)

    def empty_numbers(rows: Tensor) -> Tensor:
        return torch.empty(rows.shape[:-1], dtype=torch.float32, device=rows.device)

    from_prefix, from_patches = empty_numbers(key), empty_numbers(key)
    entropy, log_sum_exp, maximum, total = (empty_numbers(query) for _ in range(4))
    tensors = (query, key, log_weights(weights))
    numbers = (query.stride()[:-1], key.stride()[:-1], num_heads, num_queries, key.shape[2])
    scale_log2 = scale * LOG2_E.value
    constants = {**head_constants(query, key), **config.options(), "IS_CAUSAL": is_causal}
    with device_guard(query.device):
        row_statistics_kernel[row_programs(query, config.block_stationary)](
            *tensors, entropy, log_sum_exp, maximum, total, *numbers, scale_log2, **constants
        )
        column_statistics_kernel[row_programs(key, config.block_streamed)](
            *tensors,
            maximum,
            total,
            from_prefix,
            from_patches,
            *numbers,
            num_prefix_tokens,
            scale_log2,
            **constants,
        )
    return AttentionStatistics(from_prefix, from_patches, entropy, log_sum_exp)
