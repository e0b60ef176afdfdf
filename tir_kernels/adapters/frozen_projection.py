"""A frozen projection and its low-rank change as one function, with few and large products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tir_kernels.operators.dropout import philox_dropout
from tir_kernels.operators.dropped_product import dropped_product, factor_gradient
from tir_kernels.operators.second_derivative import differentiable_once
from tir_kernels.precision import autocast_dtype, without_autocast
from tir_kernels.towers.products import input_gradient, linear


class Dropping(NamedTuple):
    """Counted dropout in front of a layer's maps, for each map by itself."""

    seeds: Tensor  # (G,) int64, one an episode
    step: Tensor  # (1,) int64, which must not change before the backward pass
    stream: int
    first_branch: int
    probability: float
    backend: str

    def of(self, rows: Tensor, count: int) -> Tensor:
        """(G, S, T, D) -> (G, K, S, T, D)."""
        return philox_dropout(
            rows,
            self.seeds,
            self.step,
            num_branches=count,
            **self._options,
        )

    def product(self, rows: Tensor, factor: Tensor) -> Tensor:
        """(G, S, T, D), dropped, times (G, K, rank, D) -> (G, K, S T, rank)."""
        if drops_as_it_reads(rows):
            return dropped_product(rows, self.seeds, self.step, factor, **self._options)
        dropped = self._batched(rows, factor.shape[1])
        return torch.bmm(dropped, factor.flatten(0, 1).mT).unflatten(0, factor.shape[:2])

    def factor_gradient(self, rows: Tensor, grad: Tensor) -> Tensor:
        """The factor's gradient (G, K, rank, D), from that of the product."""
        if drops_as_it_reads(rows):
            return factor_gradient(rows, self.seeds, self.step, grad, **self._options)
        dropped = self._batched(rows, grad.shape[1])
        return torch.bmm(grad.flatten(0, 1).mT, dropped).unflatten(0, grad.shape[:2])

    def _batched(self, rows: Tensor, count: int) -> Tensor:
        """(G, S, T, D), dropped -> (G K, S T, D)."""
        return self.of(rows, count).flatten(2, 3).flatten(0, 1)

    @property
    def _options(self) -> dict[str, Any]:
        names = ("stream", "first_branch", "probability", "backend")
        return {name: getattr(self, name) for name in names}


def drops_as_it_reads(rows: Tensor) -> bool:
    """Whether products drop such rows as they read them: on a GPU, where a kernel does."""
    return rows.is_cuda


class FrozenProjection(torch.autograd.Function):
    """A frozen projection and its change, in one buffer, from one copy of the tokens.

    The maps of all episodes are multiplied as one batch wherever that copies nothing. The backward
    pass drops again instead of keeping what was left of the tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        dropping: Dropping | None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, K O), with (K O, D), (K O,), (G, K, rank, D) and (G, K, O, rank)."""
        tokens = tokens.to(autocast_dtype(tokens.device.type) or tokens.dtype)
        projected = linear(tokens, weight, bias)
        episodes, count, rank, _ = a.shape
        rows = tokens.reshape(episodes, -1, *tokens.shape[-2:])
        if dropping is None:  # one product serves all maps
            together = torch.bmm(rows.flatten(1, 2), a.flatten(1, 2).mT)
            compressed = together.unflatten(2, (count, rank)).transpose(1, 2)
        else:
            compressed = dropping.product(rows, a)
        parts = _of_maps(projected, b)
        for batch in _batches(episodes, count):
            parts[batch].baddbmm_(compressed[batch], b[batch].mT)
        # The factors themselves: what a second derivative would be taken with respect to.
        step = None if dropping is None else dropping.step
        ctx.save_for_backward(a, b, rows, weight, compressed, step)
        ctx.dropping = dropping
        return projected

    @staticmethod
    @differentiable_once("add LoRA with passes_input_gradient=True")
    def backward(ctx: Any, saved: tuple, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, rows, weight, compressed, _ = saved
        # All types are chosen here, whatever region the pass runs in.
        with without_autocast(grad.device.type):
            grad_tokens = None
            if ctx.needs_input_grad[0]:
                grad_tokens = input_gradient(grad, weight)
            episodes, count, rank, _ = a.shape
            parts = _of_maps(grad, b)
            shape = (*parts.shape[:3], rank)
            grad_b, grad_compressed = torch.empty_like(b), parts.new_empty(shape)
            for batch in _batches(episodes, count):
                torch.bmm(parts[batch], b[batch], out=grad_compressed[batch])
                _transposed_product(parts[batch], compressed[batch], grad_b[batch])
            if ctx.dropping is None:
                together = grad_compressed.transpose(1, 2).flatten(2)
                grad_a = torch.bmm(together.mT, rows.flatten(1, 2)).view_as(a)
            else:
                grad_a = ctx.dropping.factor_gradient(rows, grad_compressed)
        return grad_tokens, None, None, grad_a, grad_b, None


def _of_maps(packed: Tensor, b: Tensor) -> Tensor:
    """(B, L, K O) -> (G, K, rows, O), a view."""
    episodes, count, output, _ = b.shape
    return packed.reshape(episodes, -1, count, output).transpose(1, 2)


def _batches(episodes: int, count: int) -> Iterable[Any]:
    """Indices into (G, K, ...), each of a batch of products: as few as need no copy."""
    if episodes <= count:
        return range(episodes)
    return [(slice(None), index) for index in range(count)]


def _transposed_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``left^T right``, (n, rows, O) and (n, rows, rank), to (n, O, rank)."""
    if writes_transposed(left):
        torch.bmm(left.mT, right, out=out)
    else:
        out.copy_(torch.bmm(right.mT, left).mT)


def writes_transposed(rows: Tensor) -> bool:
    """Whether a product with transposed rows costs no more than one with rows, and a copy."""
    return rows.is_cuda
