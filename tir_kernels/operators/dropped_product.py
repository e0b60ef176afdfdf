"""Products with rows under Philox dropout, which a backend may drop as it reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.backends.optional import DropoutInputs
from tir_kernels.operators.checks import require_same_device, require_tensor
from tir_kernels.operators.choose import choose_backend
from tir_kernels.operators.dropout import check_dropout, dropout_inputs
from tir_kernels.operators.library import OPS, define, define_fake


def dropped_product(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    factor: Tensor,
    *,
    stream: int = 0,
    first_branch: int = 0,
    probability: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Rows under :func:`philox_dropout`, for each branch by itself, times the branch's factor.

    No gradient flows. Triton's kernel drops the rows as it reads them, and writes no copy of them.

    Args:
        rows, seeds, step, stream, first_branch, probability, backend: As for ``philox_dropout``.
        factor: (G, K, R, D) of the type of the rows, one for each of K branches.

    Returns:
        (G, K, S T, R), ``dropped rows @ factor^T``.

    Raises:
        ValueError, TypeError: A shape, type or number outside these.
        RuntimeError: A backend that cannot run here.
    """
    numbers = _checked(rows, seeds, step, "factor", factor, (stream, first_branch), probability,
                       backend)  # fmt: skip
    _require_size("factor", factor, 3, rows.shape[3])
    return OPS.dropped_product(rows.detach(), seeds, step, factor.detach(), *numbers, backend)


def factor_gradient(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    grad: Tensor,
    *,
    stream: int = 0,
    first_branch: int = 0,
    probability: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """The gradient of the factor of :func:`dropped_product` from that of the result.

    No gradient flows. It is the same to the bit each time.

    Args:
        rows, seeds, step, stream, first_branch, probability, backend: As they were.
        grad: (G, K, S T, R) of the type of the rows.

    Returns:
        (G, K, R, D), ``grad^T @ dropped rows``.

    Raises:
        ValueError, TypeError: A shape, type or number outside these.
        RuntimeError: A backend that cannot run here.
    """
    numbers = _checked(rows, seeds, step, "grad", grad, (stream, first_branch), probability,
                       backend)  # fmt: skip
    _require_size("grad", grad, 2, rows.shape[1] * rows.shape[2])
    return OPS.factor_gradient(rows.detach(), seeds, step, grad.detach(), *numbers, backend)


def _checked(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    name: str,
    other: Tensor,
    places: tuple[int, int],
    probability: float,
    backend: str,
) -> tuple[int, int, float]:
    """Stream, first branch and probability as numbers."""
    require_tensor(name, other, "(G, K, R, D)" if name == "factor" else "(G, K, S T, R)")
    of_dropout = (*places, other.shape[1])
    stream, first, _, probability = check_dropout(
        rows, seeds, step, of_dropout, probability, backend
    )
    require_same_device(name, other, "rows", rows)
    _require_size(name, other, 0, len(rows))
    if other.dtype != rows.dtype:
        raise TypeError(f"{name} must be of the type of rows, {rows.dtype}; got {other.dtype}")
    return stream, first, probability


def _require_size(name: str, tensor: Tensor, dimension: int, size: int) -> None:
    if tensor.shape[dimension] != size:
        raise ValueError(
            f"{name} must have {size} entries in dimension {dimension} to fit rows; "
            f"got {tensor.shape[dimension]}"
        )


_ARGUMENTS = (
    "Tensor rows, Tensor seeds, Tensor step, Tensor other, int stream, int first_branch, "
    "float probability, str backend"
)


@define(f"dropped_product({_ARGUMENTS}) -> Tensor")
def _dropped_product(*arguments: Any) -> Tensor:
    """(G, S, T, D) rows, dropped for each of K branches, times (G, K, R, D) -> (G, K, S T, R)."""
    backend, inputs, factor, output = _prepared(_like_products(*arguments), *arguments)
    if output.numel() == 0:
        return output
    takes = getattr(backend, "dropped_product", None)
    if takes is None or not takes(inputs, factor, output):
        torch.bmm(_dropped(backend, inputs, factor), _batched(factor).mT, out=_batched(output))
    return output


@define_fake("dropped_product")
def _like_products(rows: Tensor, seeds: Tensor, step: Tensor, factor: Tensor, *rest: Any) -> Tensor:
    groups, sequences, length, _ = rows.shape
    return rows.new_empty((groups, factor.shape[1], sequences * length, factor.shape[2]))


@define(f"factor_gradient({_ARGUMENTS}) -> Tensor")
def _factor_gradient(*arguments: Any) -> Tensor:
    """(G, K, S T, R), the gradient of such a product -> (G, K, R, D), that of the factor."""
    backend, inputs, grad, output = _prepared(_like_factor(*arguments), *arguments)
    if output.numel() == 0 or grad.numel() == 0:
        return output.zero_()
    takes = getattr(backend, "factor_gradient", None)
    if takes is None or not takes(inputs, grad, output):
        torch.bmm(_batched(grad).mT, _dropped(backend, inputs, grad), out=_batched(output))
    return output


@define_fake("factor_gradient")
def _like_factor(rows: Tensor, seeds: Tensor, step: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    groups, branches, _, rank = grad.shape
    return rows.new_empty((groups, branches, rank, rows.shape[-1]))


def _prepared(
    output: Tensor, rows: Tensor, seeds: Tensor, step: Tensor, other: Tensor, *rest: Any
) -> tuple[Any, DropoutInputs, Tensor, Tensor]:
    *numbers, name = rest
    backend = choose_backend(name, "philox_dropout", rows.device, rows.dtype)
    return backend, dropout_inputs(rows, seeds, step, *numbers), other.contiguous(), output


def _dropped(backend: Any, inputs: DropoutInputs, other: Tensor) -> Tensor:
    """(G K, S T, D)."""
    rows = inputs.rows
    dropped = rows.new_empty((rows.shape[0], other.shape[1], *rows.shape[1:]))
    backend.philox_dropout(inputs, dropped)
    return dropped.flatten(2, 3).flatten(0, 1)


def _batched(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)
