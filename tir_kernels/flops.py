"""Operation counts of ours for ``torch.utils.flop_counter``; import it before counting.

It is not imported with the package, because PyTorch's counter imports Triton.
"""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import register_flop_formula

# Importing an operator's file registers it.
from tir_kernels.operators import attention_statistics, reweighted_attention  # noqa: F401
from tir_kernels.operators.library import OPS

Shape = tuple[int, ...]


@register_flop_formula(OPS.weighted_attention)
def _weighted_attention(query: Shape, key: Shape, *rest: Any, **options: Any) -> int:
    return _attention_products(query, key, 2)


@register_flop_formula(OPS.attention_statistics)
def _attention_statistics(query: Shape, key: Shape, *rest: Any, **options: Any) -> int:
    return _attention_products(query, key, 2)  # the scores of rows, and once more of columns


@register_flop_formula([OPS.weighted_attention_backward, OPS.reweighted_attention_backward])
def _attention_backward(
    grad_output: Shape, query: Shape, key: Shape, *rest: Any, **options: Any
) -> int:
    return _attention_products(query, key, 5)  # the scores once more, and four gradients


@register_flop_formula(OPS.token_relevance)
def _token_relevance(*inputs: Any, out_shape: Any, **options: Any) -> int:
    return _relevance_products(inputs, num_patches=out_shape[-1])


@register_flop_formula(OPS.token_weights)
def _token_weights(*inputs: Any, out_shape: Any, **options: Any) -> int:
    return _relevance_products(inputs, num_patches=out_shape[1][-1])


@register_flop_formula(OPS.reweighted_attention)
def _reweighted_attention(
    query: Shape, key: Shape, value: Shape, *inputs: Any, out_shape: Any, **options: Any
) -> int:
    relevance = _relevance_products(inputs, num_patches=out_shape[2][-1])
    return relevance + _attention_products(query, key, 2)


def _attention_products(query: Shape, key: Shape, count: int) -> int:
    """So many products between Lq x d and L x d matrices, as PyTorch counts its own attention:
    causality saves nothing.
    """
    batch, heads, num_queries, head_dim = query
    return count * _product(batch * heads, num_queries, head_dim, key[2])


def _relevance_products(inputs: tuple[Any, ...], num_patches: int) -> int:
    """The projection of the patch tokens, and their products with the classes."""
    tokens, class_embeddings, _, _, _, proj = inputs[:6]
    batch, _, model_dim = tokens
    num_classes, joint_dim = class_embeddings[-2:]
    projection = 0 if proj is None else _product(batch, num_patches, model_dim, joint_dim)
    return projection + _product(batch, num_patches, joint_dim, num_classes)


def _product(batch: int, rows: int, depth: int, columns: int) -> int:
    """Operations of ``batch`` products of (rows, depth) and (depth, columns) matrices."""
    return 2 * batch * rows * depth * columns
