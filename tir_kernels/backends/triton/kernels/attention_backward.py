"""Weighted attention, backward, in two kernels and without atomics, so that every run gives the
same bits.

The first has stationary queries and streamed keys: it gives the gradient of the queries and, on the
way, delta[i] = grad_output[i] . output[i]. The second has stationary keys and streamed queries: it
gives the gradients of keys, values and weights. The latter are one partial sum a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import common
from ...common import device_guard, empty_gradients, with_contiguous_rows
from ...inputs import AttentionInputs, BackwardInputs
from ...protocol import Gradients
from ..configs import cut, grad_key_value_config, grad_query_config
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
    load_columns,
    load_rows,
    locate_rows,
    loop_bound,
    narrow,
    row_programs,
    scale_rows,
    start_of_queries,
    store_rows,
    strides_of,
    which_exist,
    zero_rows,
)

MAX_EXPONENT_LOG2 = tl.constexpr(common.MAX_EXPONENT * common.LOG2_E)


@triton.jit
def load_log_sums(log_sum_exp_ptr, rows, in_range):
    """Base-2 log-sum-exp of some rows; rows that attend to nothing, or are none, get +inf, so that
    their probabilities are exp(-inf) = 0.
    """
    log_sums = tl.load(log_sum_exp_ptr + rows, mask=in_range, other=float("-inf")) * LOG2_E
    return tl.where(log_sums == float("-inf"), float("inf"), log_sums)


@triton.jit
def row_products(
    left_ptr,
    right_ptr,
    rows,
    in_range,
    left_stride,
    right_stride,
    HEAD_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Scalar product of every row with its partner.

    A few columns at a time: the same tile used here and as an operand of tl.dot would be kept in
    registers whole.
    """
    total = tl.zeros(rows.shape, tl.float32)
    for first in tl.static_range(0, HEAD_DIM, 32):
        left = load_columns(left_ptr, rows, in_range, left_stride, first, 32, HEAD_DIM, STRIDE_UNIT)
        right = load_columns(
            right_ptr, rows, in_range, right_stride, first, 32, HEAD_DIM, STRIDE_UNIT
        )
        total += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def grad_query_kernel(
    grad_output_ptr,  # [B, H, Lq, d]
    query_ptr,  # [B, H, Lq, d]
    key_ptr,  # [B, H, L, d]
    value_ptr,  # [B, H, L, d]
    log_weights_ptr,  # [B, L]; None: all are 0
    output_ptr,  # [B, H, Lq, d]
    log_sum_exp_ptr,  # [B, H, Lq]
    grad_query_ptr,  # [B, H, Lq, d]
    delta_ptr,  # [B, H, Lq]
    output_strides,  # of batch, head and row
    grad_query_strides,
    grad_output_strides,
    query_strides,
    key_strides,
    value_strides,
    num_heads,
    num_queries,
    num_keys,
    scale,
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
    grad_output_ptr = head_pointer(grad_output_ptr, batch, head, grad_output_strides, STRIDE_UNIT)
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
    grads = load_rows(
        grad_output_ptr, rows, in_range, grad_output_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
    )
    grad_query = zero_rows(BLOCK_QUERY, MAIN, TAIL)
    delta = row_products(
        grad_output_ptr,
        head_pointer(output_ptr, batch, head, output_strides, STRIDE_UNIT),
        rows,
        in_range,
        grad_output_strides[2],
        output_strides[2],
        HEAD_DIM,
        STRIDE_UNIT,
    )
    tl.store(delta_ptr + first_row + rows, delta, mask=in_range)
    log_sums = load_log_sums(log_sum_exp_ptr + first_row, rows, in_range)

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
            bias, attended = load_log_weights(log_weights_ptr, keys, end, not is_rest)
            key = load_rows(
                key_ptr, keys, attended, key_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
            )
            value = load_rows(
                value_ptr, keys, attended, value_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
            )
            scores = dot_transposed(query, key, TAIL)
            grad_probabilities = dot_transposed(grads, value, TAIL)
            exponents = scores * (scale * LOG2_E) - log_sums[:, None]
            if is_rest or log_weights_ptr is not None:
                exponents += bias[None, :]
            exponents = hide_later_keys(exponents, rows[:, None], keys[None, :], IS_CAUSAL)
            grad_scores = tl.exp2(exponents) * (grad_probabilities - delta[:, None])
            grad_query = dot_rows(narrow(grad_scores, key[0].dtype), key, grad_query, TAIL)

    grad_query = scale_rows(grad_query, scale, TAIL)
    grad_query_ptr = head_pointer(grad_query_ptr, batch, head, grad_query_strides, STRIDE_UNIT)
    store_rows(
        grad_query_ptr,
        rows,
        in_range,
        grad_query,
        grad_query_strides[2],
        HEAD_DIM,
        TAIL,
        STRIDE_UNIT,
    )


@triton.jit(do_not_specialize=["num_heads", "num_queries", "num_keys"])
def grad_key_value_kernel(
    grad_output_ptr,  # [B, H, Lq, d]
    query_ptr,  # [B, H, Lq, d]
    key_ptr,  # [B, H, L, d]
    value_ptr,  # [B, H, L, d]
    weights_ptr,  # [B, L]; None unless NEEDS_WEIGHTS_GRAD
    log_weights_ptr,  # [B, L]; None: all are 0
    log_sum_exp_ptr,  # [B, H, Lq]
    delta_ptr,  # [B, H, Lq]
    grad_key_ptr,  # [B, H, L, d]
    grad_value_ptr,  # [B, H, L, d]
    grad_weights_ptr,  # [B, H, L]; not touched unless NEEDS_WEIGHTS_GRAD
    grad_key_strides,  # of batch, head and row
    grad_value_strides,
    grad_output_strides,
    query_strides,
    key_strides,
    value_strides,
    num_heads,
    num_queries,
    num_keys,
    scale,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    NEEDS_WEIGHTS_GRAD: tl.constexpr,
):
    first_key, batch, head, head_number = locate_rows(num_heads, num_keys, BLOCK_KEY)
    grad_output_ptr = head_pointer(grad_output_ptr, batch, head, grad_output_strides, STRIDE_UNIT)
    query_ptr = head_pointer(query_ptr, batch, head, query_strides, STRIDE_UNIT)
    key_ptr = head_pointer(key_ptr, batch, head, key_strides, STRIDE_UNIT)
    value_ptr = head_pointer(value_ptr, batch, head, value_strides, STRIDE_UNIT)
    if log_weights_ptr is not None:
        log_weights_ptr += batch.to(tl.int64) * num_keys
    first_row, first_key_row = head_number * num_queries, head_number * num_keys

    keys = first_key + tl.arange(0, BLOCK_KEY)
    in_range = keys < num_keys
    bias, attended = load_log_weights(log_weights_ptr, keys, num_keys, ALL_EXIST=False)
    # A key that is not attended to gets a bias of 0, as if its weight were 1, and what it sums up
    # for itself and its value is dropped at the end: all of these sums belong to single keys.
    bias = tl.where(attended, bias, 0.0)
    needed = attended
    if NEEDS_WEIGHTS_GRAD:
        # At weight 0 the weight's own derivative needs the true key and value; below 0 nothing
        # does.
        weights_ptr += batch.to(tl.int64) * num_keys
        weights = tl.load(weights_ptr + keys, mask=in_range, other=0.0)
        needed = in_range & ((weights < 0.0) == 0)
    key = load_rows(key_ptr, keys, needed, key_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT)
    value = load_rows(value_ptr, keys, needed, value_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT)
    grad_key = zero_rows(BLOCK_KEY, MAIN, TAIL)
    grad_value = zero_rows(BLOCK_KEY, MAIN, TAIL)
    grad_weights = tl.zeros((BLOCK_KEY,), tl.float32)

    start = start_of_queries(first_key, BLOCK_QUERY, IS_CAUSAL)
    whole = end_of_blocks(num_queries, BLOCK_QUERY, HAS_BLOCKS)
    for is_rest in tl.static_range(0 if HAS_BLOCKS else 1, 2 if BLOCK_REST > 0 else 1):
        for first_query in tl.range(
            loop_bound(tl.maximum(start, whole) if is_rest else start),
            loop_bound(num_queries if is_rest else whole),
            BLOCK_REST if is_rest else BLOCK_QUERY,
            num_stages=1 if is_rest else None,
        ):
            rows = first_query + tl.arange(0, BLOCK_REST if is_rest else BLOCK_QUERY)
            row_exists = which_exist(rows, num_queries, not is_rest)
            query = load_rows(
                query_ptr, rows, row_exists, query_strides[2], HEAD_DIM, MAIN, TAIL, STRIDE_UNIT
            )
            grads = load_rows(
                grad_output_ptr,
                rows,
                row_exists,
                grad_output_strides[2],
                HEAD_DIM,
                MAIN,
                TAIL,
                STRIDE_UNIT,
            )
            scores = dot_transposed(key, query, TAIL)
            grad_probabilities = dot_transposed(value, grads, TAIL)
            log_sums = load_log_sums(log_sum_exp_ptr + first_row, rows, row_exists)
            delta = tl.load(delta_ptr + first_row + rows, mask=row_exists, other=0.0)
            exponents = scores * (scale * LOG2_E) - log_sums[None, :]
            if log_weights_ptr is not None:
                exponents += bias[:, None]
            # The limit of an unattended key may overflow; NaN must not be lost here.
            exponents = tl.minimum(exponents, MAX_EXPONENT_LOG2, propagate_nan=tl.PropagateNan.ALL)
            exponents = hide_later_keys(exponents, rows[None, :], keys[:, None], IS_CAUSAL)
            probabilities = tl.exp2(exponents)
            grad_scores = probabilities * (grad_probabilities - delta[None, :])
            if NEEDS_WEIGHTS_GRAD:
                grad_weights += tl.sum(grad_scores, 1)
            grad_value = dot_rows(narrow(probabilities, key[0].dtype), grads, grad_value, TAIL)
            grad_key = dot_rows(narrow(grad_scores, key[0].dtype), query, grad_key, TAIL)

    keep = attended[:, None]
    grad_key = scale_rows(grad_key, scale, TAIL)
    grad_key = (tl.where(keep, grad_key[0], 0.0), tl.where(keep, grad_key[1], 0.0))
    grad_value = (tl.where(keep, grad_value[0], 0.0), tl.where(keep, grad_value[1], 0.0))
    grad_key_ptr = head_pointer(grad_key_ptr, batch, head, grad_key_strides, STRIDE_UNIT)
    store_rows(
        grad_key_ptr, keys, in_range, grad_key, grad_key_strides[2], HEAD_DIM, TAIL, STRIDE_UNIT
    )
    grad_value_ptr = head_pointer(grad_value_ptr, batch, head, grad_value_strides, STRIDE_UNIT)
    store_rows(
        grad_value_ptr,
        keys,
        in_range,
        grad_value,
        grad_value_strides[2],
        HEAD_DIM,
        TAIL,
        STRIDE_UNIT,
    )
    if NEEDS_WEIGHTS_GRAD:
        grad_weights = grad_weights / tl.where(attended, weights, 1.0)
        grad_weights = tl.where(weights < 0.0, 0.0, grad_weights)
        tl.store(grad_weights_ptr + first_key_row + keys, grad_weights, mask=in_range)


def attention_backward(inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
    """Gradients of query, key, value and weights (B, L), or (0,) if the latter is not needed."""
    query, key, value, weights, scale, is_causal = inputs
    output, log_sum_exp, grad_output, needs_weights_grad, is_packed = backward
    _, num_heads, num_queries, head_dim = query.shape
    capability = device_capability(query.device)
    query_config = grad_query_config(capability, query.dtype, head_dim)
    key_config = grad_key_value_config(capability, query.dtype, head_dim)

    def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    grads = grad_query, grad_key, grad_value = empty_gradients(inputs, is_packed)
    output = with_contiguous_rows(output)
    delta = empty(log_sum_exp.shape, torch.float32)
    partial_grad_weights = delta
    if needs_weights_grad:
        partial_grad_weights = empty(key.shape[:-1], torch.float32)

    log_sum_exp, logarithms = log_sum_exp.contiguous(), log_weights(weights)
    if weights is not None:
        weights = weights.contiguous() if needs_weights_grad else None
    rows = (grad_output, query, key, value)
    strides = (strides_of(tensor) for tensor in rows)
    numbers = (*strides, num_heads, num_queries, key.shape[2], scale)
    constants = {**head_constants(*rows, output, *grads), "IS_CAUSAL": is_causal}
    with device_guard(query.device):
        grad_query_kernel[row_programs(query, query_config.block_stationary)](
            *rows,
            logarithms,
            output,
            log_sum_exp,
            grad_query,
            delta,
            strides_of(output),
            strides_of(grad_query),
            *numbers,
            **constants,
            **query_config.options(),
            **cut(key.shape[2], query_config.block_streamed, query.dtype),
        )
        grad_key_value_kernel[row_programs(key, key_config.block_stationary)](
            *rows,
            weights,
            logarithms,
            log_sum_exp,
            delta,
            grad_key,
            grad_value,
            partial_grad_weights,
            strides_of(grad_key),
            strides_of(grad_value),
            *numbers,
            **constants,
            **key_config.options(keys_are_stationary=True),
            **cut(num_queries, key_config.block_streamed, query.dtype),
            NEEDS_WEIGHTS_GRAD=needs_weights_grad,
        )
    if needs_weights_grad:
        return (*grads, partial_grad_weights.sum(1))
    return (*grads, delta.new_empty(0))
