"""Weighted attention, backward, in two kernels and without atomics, so that every run gives the
same bits.

The first holds query rows still and walks over the keys: it gives the gradient of the queries and,
on the way, delta[i] = grad_output[i] . output[i]. The second holds keys still and walks over the
queries: it gives the gradients of keys, values and weights. The latter are one partial sum a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import common
from ...common import device_guard
from ..configs import grad_key_value_config, grad_query_config, split_width
from .tiles import (
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
    HEAD_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):
    """Scalar product of every row with its contiguous partner.

    A few columns at a time: the same tile used here and as an operand of tl.dot would be kept in
    registers whole.
    """
    total = tl.zeros(rows.shape, tl.float32)
    for first in tl.static_range(0, HEAD_DIM, 32):
        left = load_rows(left_ptr, rows, in_range, left_stride, first, 32, HEAD_DIM, STRIDE_UNIT)
        right = load_rows(right_ptr, rows, in_range, HEAD_DIM, first, 32, HEAD_DIM, 1)
        total += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    return total


@triton.jit(do_not_specialize=["num_heads", "length"])
def grad_query_kernel(
    grad_output_ptr,  # [B, H, L, d]
    query_ptr,  # [B, H, L, d]
    key_ptr,  # [B, H, L, d]
    value_ptr,  # [B, H, L, d]
    weights_ptr,  # [B, L]
    output_ptr,  # [B, H, L, d], contiguous
    log_sum_exp_ptr,  # [B, H, L]
    grad_query_ptr,  # [B, H, L, d], contiguous
    delta_ptr,  # [B, H, L]
    grad_batch_stride,
    grad_head_stride,
    grad_row_stride,
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
    scale,
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
    first_row = batch_head.to(tl.int64) * length
    grad_output_ptr += head_offset(batch, head, grad_batch_stride, grad_head_stride, STRIDE_UNIT)
    query_ptr += head_offset(batch, head, query_batch_stride, query_head_stride, STRIDE_UNIT)
    key_ptr += head_offset(batch, head, key_batch_stride, key_head_stride, STRIDE_UNIT)
    value_ptr += head_offset(batch, head, value_batch_stride, value_head_stride, STRIDE_UNIT)
    weights_ptr += batch.to(tl.int64) * length
    output_ptr += first_row * HEAD_DIM
    grad_query_ptr += first_row * HEAD_DIM

    rows = (tl.program_id(0) % num_blocks) * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    in_range = rows < length
    query = load_rows(query_ptr, rows, in_range, query_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
    grads = load_rows(
        grad_output_ptr, rows, in_range, grad_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT
    )
    grad_query = tl.zeros((BLOCK_QUERY, MAIN), tl.float32)
    if TAIL > 0:
        query_tail = load_rows(
            query_ptr, rows, in_range, query_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
        )
        grads_tail = load_rows(
            grad_output_ptr, rows, in_range, grad_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
        )
        grad_query_tail = tl.zeros((BLOCK_QUERY, TAIL), tl.float32)
    delta = row_products(
        grad_output_ptr, output_ptr, rows, in_range, grad_row_stride, HEAD_DIM, STRIDE_UNIT
    )
    tl.store(delta_ptr + first_row + rows, delta, mask=in_range)
    log_sums = load_log_sums(log_sum_exp_ptr + first_row, rows, in_range)

    for first_key in range(0, loop_end(length), BLOCK_KEY):
        keys = first_key + tl.arange(0, BLOCK_KEY)
        _, attended, log_weights = load_key_weights(weights_ptr, keys, length)
        bias = tl.where(attended, log_weights, float("-inf"))
        key = load_rows(key_ptr, keys, attended, key_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
        value = load_rows(
            value_ptr, keys, attended, value_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT
        )
        zeros = tl.zeros((BLOCK_QUERY, BLOCK_KEY), tl.float32)
        scores = dot(query, tl.trans(key), zeros)
        grad_probabilities = dot(grads, tl.trans(value), zeros)
        if TAIL > 0:
            key_tail = load_rows(
                key_ptr, keys, attended, key_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
            )
            value_tail = load_rows(
                value_ptr, keys, attended, value_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
            )
            scores = dot(query_tail, tl.trans(key_tail), scores)
            grad_probabilities = dot(grads_tail, tl.trans(value_tail), grad_probabilities)
        exponents = scores * (scale * LOG2_E) + bias[None, :] - log_sums[:, None]
        grad_scores = tl.exp2(exponents) * (grad_probabilities - delta[:, None])
        grad_scores = narrow(grad_scores, key.dtype)
        grad_query = dot(grad_scores, key, grad_query)
        if TAIL > 0:
            grad_query_tail = dot(grad_scores, key_tail, grad_query_tail)

    grad_query *= scale
    store_rows(grad_query_ptr, rows, in_range, grad_query, 0, MAIN, HEAD_DIM)
    if TAIL > 0:
        grad_query_tail *= scale
        store_rows(grad_query_ptr, rows, in_range, grad_query_tail, MAIN, TAIL, HEAD_DIM)


@triton.jit(do_not_specialize=["num_heads", "length"])
def grad_key_value_kernel(
    grad_output_ptr,  # [B, H, L, d]
    query_ptr,  # [B, H, L, d]
    key_ptr,  # [B, H, L, d]
    value_ptr,  # [B, H, L, d]
    weights_ptr,  # [B, L]
    log_sum_exp_ptr,  # [B, H, L]
    delta_ptr,  # [B, H, L]
    grad_key_ptr,  # [B, H, L, d], contiguous
    grad_value_ptr,  # [B, H, L, d], contiguous
    grad_weights_ptr,  # [B, H, L]; not touched unless NEEDS_WEIGHTS_GRAD
    grad_batch_stride,
    grad_head_stride,
    grad_row_stride,
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
    scale,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    NEEDS_WEIGHTS_GRAD: tl.constexpr,
):
    num_blocks = tl.cdiv(length, BLOCK_KEY)
    batch_head = tl.program_id(0) // num_blocks
    batch = batch_head // num_heads
    head = batch_head % num_heads
    first_row = batch_head.to(tl.int64) * length
    grad_output_ptr += head_offset(batch, head, grad_batch_stride, grad_head_stride, STRIDE_UNIT)
    query_ptr += head_offset(batch, head, query_batch_stride, query_head_stride, STRIDE_UNIT)
    key_ptr += head_offset(batch, head, key_batch_stride, key_head_stride, STRIDE_UNIT)
    value_ptr += head_offset(batch, head, value_batch_stride, value_head_stride, STRIDE_UNIT)
    grad_key_ptr += first_row * HEAD_DIM
    grad_value_ptr += first_row * HEAD_DIM

    keys = (tl.program_id(0) % num_blocks) * BLOCK_KEY + tl.arange(0, BLOCK_KEY)
    in_range = keys < length
    weights, attended, bias = load_key_weights(
        weights_ptr + batch.to(tl.int64) * length, keys, length
    )
    # At weight 0 the weight's own derivative still needs the true key and value; below 0 nothing
    # does. Such a key's bias is 0, as if its weight were 1, and what it sums up for its key and
    # value is dropped at the end: all of these sums belong to single keys.
    needed = in_range & ((weights < 0.0) == 0)
    key = load_rows(key_ptr, keys, needed, key_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
    value = load_rows(value_ptr, keys, needed, value_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT)
    grad_key = tl.zeros((BLOCK_KEY, MAIN), tl.float32)
    grad_value = tl.zeros((BLOCK_KEY, MAIN), tl.float32)
    if TAIL > 0:
        key_tail = load_rows(
            key_ptr, keys, needed, key_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
        )
        value_tail = load_rows(
            value_ptr, keys, needed, value_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
        )
        grad_key_tail = tl.zeros((BLOCK_KEY, TAIL), tl.float32)
        grad_value_tail = tl.zeros((BLOCK_KEY, TAIL), tl.float32)
    grad_weights = tl.zeros((BLOCK_KEY,), tl.float32)

    for first_query in range(0, loop_end(length), BLOCK_QUERY):
        rows = first_query + tl.arange(0, BLOCK_QUERY)
        row_exists = rows < length
        query = load_rows(
            query_ptr, rows, row_exists, query_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT
        )
        grads = load_rows(
            grad_output_ptr, rows, row_exists, grad_row_stride, 0, MAIN, HEAD_DIM, STRIDE_UNIT
        )
        zeros = tl.zeros((BLOCK_KEY, BLOCK_QUERY), tl.float32)
        scores = dot(key, tl.trans(query), zeros)
        grad_probabilities = dot(value, tl.trans(grads), zeros)
        if TAIL > 0:
            query_tail = load_rows(
                query_ptr, rows, row_exists, query_row_stride, MAIN, TAIL, HEAD_DIM, STRIDE_UNIT
            )
            grads_tail = load_rows(
                grad_output_ptr,
                rows,
                row_exists,
                grad_row_stride,
                MAIN,
                TAIL,
                HEAD_DIM,
                STRIDE_UNIT,
            )
            scores = dot(key_tail, tl.trans(query_tail), scores)
            grad_probabilities = dot(value_tail, tl.trans(grads_tail), grad_probabilities)
        log_sums = load_log_sums(log_sum_exp_ptr + first_row, rows, row_exists)
        delta = tl.load(delta_ptr + first_row + rows, mask=row_exists, other=0.0)
        exponents = scores * (scale * LOG2_E) + bias[:, None] - log_sums[None, :]
        # The limit of an unattended key may overflow; NaN must not be lost here.
        exponents = tl.minimum(exponents, MAX_EXPONENT_LOG2, propagate_nan=tl.PropagateNan.ALL)
        probabilities = tl.exp2(exponents)
        grad_scores = probabilities * (grad_probabilities - delta[None, :])
        if NEEDS_WEIGHTS_GRAD:
            grad_weights += tl.sum(grad_scores, 1)
        probabilities = narrow(probabilities, key.dtype)
        grad_scores = narrow(grad_scores, key.dtype)
        grad_value = dot(probabilities, grads, grad_value)
        grad_key = dot(grad_scores, query, grad_key)
        if TAIL > 0:
            grad_value_tail = dot(probabilities, grads_tail, grad_value_tail)
            grad_key_tail = dot(grad_scores, query_tail, grad_key_tail)

    keep = attended[:, None]
    grad_key = tl.where(keep, grad_key * scale, 0.0)
    grad_value = tl.where(keep, grad_value, 0.0)
    store_rows(grad_key_ptr, keys, in_range, grad_key, 0, MAIN, HEAD_DIM)
    store_rows(grad_value_ptr, keys, in_range, grad_value, 0, MAIN, HEAD_DIM)
    if TAIL > 0:
        grad_key_tail = tl.where(keep, grad_key_tail * scale, 0.0)
        grad_value_tail = tl.where(keep, grad_value_tail, 0.0)
        store_rows(grad_key_ptr, keys, in_range, grad_key_tail, MAIN, TAIL, HEAD_DIM)
        store_rows(grad_value_ptr, keys, in_range, grad_value_tail, MAIN, TAIL, HEAD_DIM)
    if NEEDS_WEIGHTS_GRAD:
        grad_weights = grad_weights / tl.where(attended, weights, 1.0)
        grad_weights = tl.where(weights < 0.0, 0.0, grad_weights)
        tl.store(grad_weights_ptr + first_row + keys, grad_weights, mask=in_range)


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    needs_weights_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value (B, H, L, d) and weights (B, L), or (0,) if not needed."""
    batch, num_heads, length, head_dim = query.shape
    capability = device_capability(query.device)
    query_config = grad_query_config(capability, query.dtype, head_dim)
    key_config = grad_key_value_config(capability, query.dtype, head_dim)

    def empty(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    grad_query, grad_key, grad_value = (empty(query.shape, query.dtype) for _ in range(3))
    delta = empty(log_sum_exp.shape, torch.float32)
    partial_grad_weights = delta
    if needs_weights_grad:
        partial_grad_weights = empty(log_sum_exp.shape, torch.float32)

    weights, log_sum_exp = weights.contiguous(), log_sum_exp.contiguous()
    inputs = (grad_output, query, key, value)
    strides = [stride for tensor in inputs for stride in tensor.stride()[:-1]]
    main, tail = split_width(head_dim)
    constants = {
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": tail,
        "STRIDE_UNIT": stride_unit(*inputs),
    }
    with device_guard(query.device):
        num_programs = triton.cdiv(length, query_config.block_held) * batch * num_heads
        grad_query_kernel[(num_programs,)](
            *inputs,
            weights,
            output.contiguous(),
            log_sum_exp,
            grad_query,
            delta,
            *strides,
            num_heads,
            length,
            scale,
            **constants,
            BLOCK_QUERY=query_config.block_held,
            BLOCK_KEY=query_config.block_step,
            num_warps=query_config.num_warps,
            num_stages=query_config.num_stages,
        )
        num_programs = triton.cdiv(length, key_config.block_held) * batch * num_heads
        grad_key_value_kernel[(num_programs,)](
            *inputs,
            weights,
            log_sum_exp,
            delta,
            grad_key,
            grad_value,
            partial_grad_weights,
            *strides,
            num_heads,
            length,
            scale,
            **constants,
            BLOCK_QUERY=key_config.block_step,
            BLOCK_KEY=key_config.block_held,
            NEEDS_WEIGHTS_GRAD=needs_weights_grad,
            num_warps=key_config.num_warps,
            num_stages=key_config.num_stages,
        )
    if needs_weights_grad:
        return grad_query, grad_key, grad_value, partial_grad_weights.sum(1)
    return grad_query, grad_key, grad_value, weights.new_empty(0)
