"""Cosine of every patch token, mapped to the joint space, with every class embedding of its group.

One program takes a block of patch tokens of one image through LayerNorm, projection and cosine. It
computes a slice of their joint features at a time and keeps only the slice's share of the squared
norm and of the products with the classes, so the features never leave the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import COSINE_EPS, device_guard
from ..configs import relevance_config
from .tiles import dot, loop_bound, narrow

EPS = tl.constexpr(COSINE_EPS)


@triton.jit
def load_tokens(tokens, columns, MODEL_DIM: tl.constexpr):
    """(rows, columns) of the tokens as float32; 0 outside.

    ``tokens`` is (pointers to rows, whether each exists, stride of columns).
    """
    row_ptrs, in_range, column_stride = tokens
    mask = in_range[:, None] & (columns < MODEL_DIM)[None, :]
    pointers = row_ptrs[:, None] + columns[None, :] * column_stride
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_statistics(tokens, norm_eps, MODEL_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1 / standard deviation of every row, in one sweep.

    The blocks' means and squared deviations are merged one by one: unlike a sum of squares, that
    loses nothing where a row's mean is far from 0.
    """
    mean = tl.sum(tl.zeros((tokens[0].shape[0], BLOCK), tl.float32), 1)
    deviations = mean
    for first in range(0, MODEL_DIM, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = load_tokens(tokens, columns, MODEL_DIM)
        size = tl.minimum(BLOCK, MODEL_DIM - first).to(tl.float32)
        block_mean = tl.sum(values, 1) / size
        centered = tl.where((columns < MODEL_DIM)[None, :], values - block_mean[:, None], 0.0)
        shift = block_mean - mean
        share = size / (first + size)
        mean += shift * share
        deviations += tl.sum(centered * centered, 1) + shift * shift * (first * share)
    return mean, 1.0 / tl.sqrt(deviations / MODEL_DIM + norm_eps)


@triton.jit
def load_normalized(
    tokens,
    statistics,
    norm_weight_ptr,
    norm_bias_ptr,
    columns,
    MODEL_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Columns of the tokens after LayerNorm, as float32; 0 in columns past MODEL_DIM."""
    values = load_tokens(tokens, columns, MODEL_DIM)
    if HAS_NORM:
        mean, inverse_deviation = statistics
        exists = columns < MODEL_DIM
        values = (values - mean[:, None]) * inverse_deviation[:, None]
        if norm_weight_ptr is not None:
            gain = tl.load(norm_weight_ptr + columns, mask=exists, other=0.0)
            values *= gain.to(tl.float32)[None, :]
        if norm_bias_ptr is not None:
            offset = tl.load(norm_bias_ptr + columns, mask=exists, other=0.0)
            values += offset.to(tl.float32)[None, :]
        values = tl.where(exists[None, :], values, 0.0)
    return values


@triton.jit
def load_projection(proj_ptr, rows, columns, strides, mask, dtype: tl.constexpr):
    """Rows and columns of the projection, in the type of the tokens; 0 outside."""
    offsets = rows.to(tl.int64)[:, None] * strides[0] + columns[None, :] * strides[1]
    proj = tl.load(proj_ptr + offsets, mask=mask, other=0.0)
    if proj.dtype != dtype:
        proj = narrow(proj.to(tl.float32), dtype)
    return proj


@triton.jit(do_not_specialize=["images_per_group", "num_prefix_tokens", "num_patches"])
def relevance_kernel(
    tokens_ptr,  # [B, L, D]
    classes_ptr,  # [G, C, E]
    norm_weight_ptr,  # [D], contiguous, or None
    norm_bias_ptr,  # [D], contiguous, or None
    proj_ptr,  # [D, E] or None
    relevance_ptr,  # [B, C, N], contiguous, float32
    token_strides,  # of image, row and column
    class_strides,  # of group, class and column
    proj_strides,  # of row and column
    images_per_group,
    num_prefix_tokens,
    num_patches,
    num_classes,
    norm_eps,
    MODEL_DIM: tl.constexpr,
    JOINT_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    num_blocks = tl.cdiv(num_patches, BLOCK_ROWS)
    image = tl.program_id(0) // num_blocks
    rows = (tl.program_id(0) % num_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_range = rows < num_patches
    tokens_ptr += image.to(tl.int64) * token_strides[0]
    row_ptrs = tokens_ptr + (rows + num_prefix_tokens).to(tl.int64) * token_strides[1]
    tokens = (row_ptrs, in_range, token_strides[2])
    dtype: tl.constexpr = tokens_ptr.dtype.element_ty
    first_class = tl.program_id(1) * BLOCK_CLASSES
    indices = tl.arange(0, BLOCK_CLASSES)
    num_own_classes = tl.minimum(BLOCK_CLASSES, num_classes - first_class)
    classes_ptr += (image // images_per_group).to(tl.int64) * class_strides[0]

    statistics = (0.0, 1.0)
    if HAS_NORM:
        statistics = row_statistics(tokens, norm_eps, MODEL_DIM, BLOCK_DEPTH)

    products = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    feature_squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    class_squares = tl.zeros((BLOCK_CLASSES,), tl.float32)
    for first_feature in range(0, JOINT_DIM, BLOCK_FEATURES):
        columns = first_feature + tl.arange(0, BLOCK_FEATURES)
        exists = columns < JOINT_DIM
        if proj_ptr is None:
            features = load_normalized(
                tokens, statistics, norm_weight_ptr, norm_bias_ptr, columns, MODEL_DIM, HAS_NORM
            )
        else:
            features = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), tl.float32)
            for first_depth in range(0, MODEL_DIM, BLOCK_DEPTH):
                depths = first_depth + tl.arange(0, BLOCK_DEPTH)
                normalized = load_normalized(
                    tokens, statistics, norm_weight_ptr, norm_bias_ptr, depths, MODEL_DIM, HAS_NORM
                )
                mask = (depths < MODEL_DIM)[:, None] & exists[None, :]
                proj = load_projection(proj_ptr, depths, columns, proj_strides, mask, dtype)
                features = dot(narrow(normalized, dtype), proj, features)
        feature_squares += tl.sum(features * features, 1)
        # Class after class, not as one product of matrices: classes are few, the features are in
        # registers already, and nothing is rounded to what tensor cores take.
        for index in range(0, loop_bound(num_own_classes)):
            class_ptr = classes_ptr + (first_class + index).to(tl.int64) * class_strides[1]
            embedding = tl.load(class_ptr + columns * class_strides[2], mask=exists, other=0.0)
            embedding = embedding.to(tl.float32)
            product = tl.sum(features * embedding[None, :], 1)
            square = tl.sum(embedding * embedding, 0)
            products += tl.where((indices == index)[None, :], product[:, None], 0.0)
            class_squares += tl.where(indices == index, square, 0.0)

    products = products / (tl.sqrt(feature_squares) + EPS)[:, None]
    products = products / (tl.sqrt(class_squares) + EPS)[None, :]
    classes = image.to(tl.int64) * num_classes + first_class + indices
    offsets = classes[None, :] * num_patches + rows[:, None]
    mask = in_range[:, None] & (indices < num_own_classes)[None, :]
    tl.store(relevance_ptr + offsets, products, mask=mask)


def relevance(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    num_prefix_tokens: int,
) -> Tensor:
    """(B, L, D) tokens and (G, C, E) class embeddings -> (B, C, N) float32."""
    batch, length, model_dim = tokens.shape
    num_groups, num_classes, joint_dim = class_embeddings.shape
    num_patches = length - num_prefix_tokens
    config = relevance_config(tokens.dtype, batch, num_patches, num_classes)
    scores = torch.empty(
        (batch, num_classes, num_patches), dtype=torch.float32, device=tokens.device
    )
    grid = (
        triton.cdiv(num_patches, config.block_rows) * batch,
        triton.cdiv(num_classes, config.block_classes),
    )
    with device_guard(tokens.device):
        relevance_kernel[grid](
            tokens,
            class_embeddings,
            None if norm_weight is None else norm_weight.contiguous(),
            None if norm_bias is None else norm_bias.contiguous(),
            proj,
            scores,
            tokens.stride(),
            class_embeddings.stride(),
            (0, 0) if proj is None else proj.stride(),
            batch // num_groups,
            num_prefix_tokens,
            num_patches,
            num_classes,
            0.0 if norm_eps is None else norm_eps,
            MODEL_DIM=model_dim,
            JOINT_DIM=joint_dim,
            HAS_NORM=norm_eps is not None,
            BLOCK_ROWS=config.block_rows,
            BLOCK_DEPTH=config.block_depth,
            BLOCK_FEATURES=config.block_features,
            BLOCK_CLASSES=config.block_classes,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return scores
