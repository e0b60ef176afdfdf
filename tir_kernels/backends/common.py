"""Helpers that backends share when they hand tensors to kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import AttentionInputs, RelevanceInputs, StatisticsInputs

RowGrid = tuple[int, int, int, int]  # address, and the strides of batch, head and row

COSINE_EPS = 1e-8  # added to both norms of the cosine
MAX_EXPONENT = 88.0  # exp() of more overflows float32
LOG2_E = 1.4426950408889634

TYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
KERNEL_DTYPES = tuple(TYPE_NAMES)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def type_name(tensor: Tensor | None) -> str:
    """The kernels' name of a type; any where there is no tensor."""
    return "float32" if tensor is None else TYPE_NAMES[tensor.dtype]


def row_grid(tensor: Tensor) -> RowGrid:
    strides = tensor.stride()
    return tensor.data_ptr(), strides[0], strides[1], strides[2]


def result_strides(rows: Tensor) -> tuple[int, int, int, int]:
    """The strides of a result (B, H, L, d) for rows of that shape.

    What lies closer together among the rows, heads or tokens, does so in the result: models have
    (B, L, H, d), and then they join heads without a copy.
    """
    _, heads, length, width = rows.shape
    _, of_head, of_row, _ = rows.stride()
    if of_head < of_row and heads > 1 and length > 1:
        return length * heads * width, width, heads * width, 1
    return heads * length * width, length * width, width, 1


def empty_result(rows: Tensor) -> Tensor:
    """A result for rows (B, H, L, d), as yet unwritten."""
    return rows.new_empty_strided(rows.shape, result_strides(rows))


def are_packed(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether they are the slices of one (B, L, 3, H, d) tensor."""
    _, heads, length, width = query.shape
    row = heads * width
    strides = (3 * length * row, width, 3 * row, 1)
    step = row * query.element_size()
    return (
        query.shape == key.shape == value.shape
        and query.stride() == key.stride() == value.stride() == strides
        and key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == step
    )


def empty_gradients(inputs: AttentionInputs, is_packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value as yet unwritten, in the type of the query.

    Args:
        inputs: Of the forward pass.
        is_packed: Lay them out as slices of one (B, L, 3, H, d) tensor.
    """
    return gradients_like(inputs, is_packed)(inputs.query)


def gradients_like(
    inputs: AttentionInputs, is_packed: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What makes :func:`empty_gradients` for inputs like these, which it does not hold, from the
    query.
    """
    if is_packed:
        batch, heads, length, width = inputs.query.shape

        def slices(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            first, second, third = query.new_empty((batch, length, 3, heads, width)).unbind(2)
            return first.transpose(1, 2), second.transpose(1, 2), third.transpose(1, 2)

        return slices
    of_query, of_key, of_value = ((rows.shape, result_strides(rows)) for rows in inputs[:3])

    def tensors(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        empty = query.new_empty_strided
        return empty(*of_query), empty(*of_key), empty(*of_value)

    return tensors


def attention_problem(
    inputs: AttentionInputs | StatisticsInputs,
) -> tuple[tuple[int, ...], str, float, bool]:
    """(B, H, Lq, L, d), type, scale and causality, which attention kernels take first."""
    batch, heads, num_queries, head_dim = inputs.query.shape
    shape = (batch, heads, num_queries, inputs.key.shape[2], head_dim)
    return shape, TYPE_NAMES[inputs.query.dtype], inputs.scale, inputs.is_causal


def relevance_problem(
    inputs: RelevanceInputs, tokens: Tensor
) -> tuple[tuple[int, ...], str, RowGrid]:
    """Sizes, type and grid of the tokens, with which the relevance kernels' arguments begin.

    Args:
        inputs: The problem.
        tokens: Its tokens, with channels that lie side by side.
    """
    batch, length, model_dim = tokens.shape
    num_groups, num_classes, joint_dim = inputs.class_embeddings.shape
    sizes = (
        batch,
        length,
        inputs.num_prefix_tokens,
        model_dim,
        joint_dim,
        num_groups,
        num_classes,
    )
    return sizes, TYPE_NAMES[tokens.dtype], (address(tokens), tokens.stride(0), 0, tokens.stride(1))


def projection_arguments(proj: Tensor | None) -> tuple[str, int, int, int]:
    """Type, address and the strides of rows and columns, of which one must be 1."""
    if proj is None:
        return "float32", 0, 0, 0
    row_stride, column_stride = proj.stride()
    return TYPE_NAMES[proj.dtype], proj.data_ptr(), row_stride, column_stride


def relevance_shape(inputs: RelevanceInputs) -> tuple[int, int, int]:
    """(B, C, N)."""
    batch, length, _ = inputs.tokens.shape
    return batch, inputs.class_embeddings.shape[-2], length - inputs.num_prefix_tokens


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def reason_of_all(reason_of: Callable[[int], str]) -> str:
    """Empty if some GPU is served, else why the current one is not.

    Args:
        reason_of: Why a GPU, by its index, is not served; empty if it is.
    """
    reason = reason_of(torch.cuda.current_device())
    if reason and any(not reason_of(index) for index in range(torch.cuda.device_count())):
        return ""
    return reason


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device current where it is not: a launch goes to the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
