"""Layer normalisation in the open: with the residual in front, and in the type of what follows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels.operators.add_norm import add_norm
from tir_kernels.operators.choose import load_backend
from tir_kernels.precision import autocast_dtype
from tir_kernels.towers.opening import Opened, is_untouched


@dataclass(frozen=True, eq=False)
class FusedNorm:
    """What is put on a layer normalisation.

    Args:
        backend: Of ``add_norm``.
    """

    backend: str


class OpenedNorm(Opened, nn.LayerNorm):
    """A layer normalisation with a :class:`FusedNorm` on it, which its block may ask for more."""

    def forward(self, input: Tensor) -> Tensor:
        return self.plain_forward(input)

    def add(self, hidden: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
        """``hidden + change``, and it normalised, in the type in which the next product is done."""
        return add_norm(
            hidden,
            change,
            self.weight,
            self.bias,
            eps=self.eps,
            dtype=autocast_dtype(hidden.device.type),
            backend=self.tir_adapters[-1].backend,
        )


def is_fusible(norm: nn.Module) -> bool:
    """Whether a layer normalisation has no hooks, and weights of one dimension that don't learn."""
    return (
        isinstance(norm, nn.LayerNorm)
        and is_untouched(norm)
        and len(norm.normalized_shape) == 1
        and norm.weight is not None
        and not any(parameter.requires_grad for parameter in norm.parameters())
    )


@torch.compiler.assume_constant_result
@functools.cache
def _has_gpu_kernels() -> bool:
    return not load_backend("triton").unavailable()


def are_fused(hidden: Tensor) -> bool:
    """Whether norms of such tokens, if opened, are one kernel: on a GPU, for which there is one.

    On a CPU, PyTorch's own takes tokens and weights of different types and converts nothing.
    """
    return hidden.is_cuda and _has_gpu_kernels()


def are_opened(*norms: Any) -> bool:
    """Whether these have been opened, and nothing has been put on them since."""
    return all(isinstance(norm, OpenedNorm) and is_fusible(norm) for norm in norms)
