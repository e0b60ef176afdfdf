"""Frozen layers of an open_clip model, for the time of a training, in the form it uses most."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.operators.choose import backend_with


class _FrozenMlp(nn.Sequential):
    """Linear, activation, linear: the bias goes into the activation, whose result is not kept."""

    def __init__(self, original: nn.Sequential, kind: str, backend: str) -> None:
        super().__init__(OrderedDict(original.named_children()))  # open_clip reads them by name
        self.kind = kind
        self.backend = backend

    def forward(self, hidden: Tensor) -> Tensor:
        first: Any = self[0]
        second: Any = self[2]
        product = F.linear(hidden, first.weight)
        activated = bias_activation(product, first.bias, self.kind, backend=self.backend)
        return F.linear(activated, second.weight, second.bias)


def _activation_kind(mlp: Any) -> str | None:
    """The kernels' name for the activation of a block's MLP; ``None`` where they can't serve."""
    if not (
        isinstance(mlp, nn.Sequential)
        and len(mlp) == 3
        and isinstance(mlp[0], nn.Linear)
        and isinstance(mlp[2], nn.Linear)
        and not any(p.requires_grad for p in mlp.parameters())
        and not any(_has_hooks(module) for module in mlp.modules())  # they would not be called
    ):
        return None
    if isinstance(mlp[1], QuickGELU):
        return "quick_gelu"
    return "gelu" if isinstance(mlp[1], nn.GELU) and mlp[1].approximate == "none" else None


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


@contextmanager
def frozen_mlps(model: nn.Module, backend: str = "auto") -> Iterator[None]:
    """Let the MLPs of frozen blocks on a CPU run through ``bias_activation``.

    On a GPU, PyTorch's products take the bias along themselves.

    Args:
        model: An open_clip model.
        backend: Backend of ``bias_activation`` where it offers that.
    """
    backend = backend_with(backend, "bias_activation")
    originals: list[tuple[Any, Any]] = []
    try:
        for block in [m for m in model.modules() if isinstance(m, ResidualAttentionBlock)]:
            kind = _activation_kind(block.mlp)
            if kind is not None and block.mlp[0].weight.device.type == "cpu":
                originals.append((block, block.mlp))
                block.mlp = _FrozenMlp(block.mlp, kind, backend)
        yield
    finally:
        for block, mlp in originals:
            block.mlp = mlp


@contextmanager
def cast_blocks(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep the matrices of frozen blocks in the type that an autocast region multiplies in.

    Autocast would convert each of them in every pass, since it remembers only those that learn.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for block in [m for m in model.modules() if isinstance(m, ResidualAttentionBlock)]:
            for name, parameter in block.named_parameters():
                is_product = "ln_" not in name and "ls_" not in name and "low_rank" not in name
                if is_product and not parameter.requires_grad:
                    kept.append((parameter, parameter.data))
                    parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, original in kept:
            parameter.data = original
