"""Frozen layers of opened towers, for the time of a training, in the form it uses most.

The contexts serve the blocks of a model's towers, and what these pool their tokens with. What a
family's blocks do not know stays as it is, and so does a tower that can't be opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels.operators.choose import backend_with
from tir_kernels.towers import norms, products
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.find import open_tower
from tir_kernels.towers.mlp import FusedActivation, OpenedMlp
from tir_kernels.towers.norms import FusedNorm, OpenedNorm
from tir_kernels.towers.opening import Opened, is_untouched, plain_type, put_on, take_off
from tir_kernels.towers.pools import OpenedPool


@contextmanager
def frozen_mlps(model: nn.Module, backend: str = "auto") -> Iterator[None]:
    """Let the MLPs of frozen blocks on a CPU run through ``bias_activation``.

    Those with GELU, exact, quick or by tanh, do; an MLP whose first layer learns its bias, has
    hooks or is not a plain ``nn.Linear`` runs as ever.

    Args:
        model: A model with towers that can be opened.
        backend: Backend of ``bias_activation`` where it offers that.
    """
    fused = FusedActivation(backend_with(backend, "bias_activation"))
    mlps = (each for each in _layers_opened_as(model, OpenedMlp) if is_untouched(each[0]))
    with _put_on_for_a_time(mlps, fused):
        yield


@contextmanager
def frozen_norms(model: nn.Module, backend: str = "auto") -> Iterator[None]:
    """Let blocks on a GPU add, normalise and convert in one kernel, where their norms are frozen.

    Autocast normalises in float32 and converts there and back; the results are the same, and those
    of open_clip's usual blocks are served. The towers must run in parts. A norm that learns or has
    hooks runs as ever.

    Args:
        model: A model with towers that can be opened.
        backend: Backend of ``add_norm`` where it offers that.
    """
    fused = FusedNorm(backend_with(backend, "add_norm"))
    fusible = (
        (norm, block)
        for norm, block in _layers_opened_as(model, OpenedNorm)
        if norms.is_fusible(norm) and norms.are_fused(norm.weight)  # type: ignore[arg-type]
    )
    with _put_on_for_a_time(fusible, fused):
        yield


class _Opener:
    """Put on an attention for the sake of its opened form alone."""


@contextmanager
def opened_attention(model: nn.Module) -> Iterator[None]:
    """Let the attention of all blocks and pools run in the open, also without an adapter on it.

    On a CPU that is this package's own attention, by far faster in 16 bits. Where it matters most
    is ``nn.MultiheadAttention``: as it lays out its tokens, PyTorch copies frozen projections once
    for every token of an image whenever gradients flow.

    Args:
        model: A model with towers that can be opened.
    """
    attentions = (each for each in _attentions(model) if is_untouched(each[0]))
    with _put_on_for_a_time(attentions, _Opener()):
        yield


@contextmanager
def _put_on_for_a_time(
    chosen: Iterable[tuple[nn.Module, BlockBase]], adapter: Any
) -> Iterator[None]:
    """Put an adapter on modules, each of which comes with a block of its family."""
    served: list[nn.Module] = []
    try:
        for module, block in chosen:
            served.append(module)
            put_on(module, adapter, block.opened)
        yield
    finally:
        for module in served:
            take_off(module, adapter)


@contextmanager
def cast_blocks(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep the matrices of frozen blocks in the type that an autocast region multiplies in.

    Autocast would convert each of them in every pass, since it remembers only those that learn.
    The towers must run in such a region, and in parts: open_clip's text tower by itself would give
    its tokens the type of its matrices. Parameters that learn, of float64 or of another class than
    ``nn.Parameter`` (quantised, distributed) stay as they are.

    Args:
        model: A model with towers that can be opened.
        dtype: The region's type.
    """
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module, parameter in _of_products(model):
            if is_untouched(module) and _is_converted(parameter, dtype):
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, original in kept:
            parameter.data = original


def packable(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of frozen blocks on a CPU whose products are faster when they are packed."""
    found = (each for _, each in _of_products(model) if _is_packable(each))
    return list({id(each): each for each in found}.values())


def _is_packable(parameter: nn.Parameter) -> bool:
    return (
        type(parameter) is nn.Parameter
        and parameter.dim() == 2
        and parameter.numel() > 0
        and parameter.device.type == "cpu"
        and not (parameter.requires_grad or parameter.is_inference())
        and products.is_faster(parameter.dtype)
    )


def _is_converted(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether autocast would convert it in every pass."""
    return (
        type(parameter) is nn.Parameter
        and not parameter.requires_grad
        and parameter.is_floating_point()
        and parameter.dtype not in (dtype, torch.float64)
    )


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, BlockBase]]:
    """The modules of a model's blocks and pools, each with a block of its family."""
    for tower, blocks in _towers(model):
        for part in (*(block.module for block in blocks), *getattr(tower, "pools", ())):
            for module in part.modules():
                yield module, blocks[0]


def _of_products(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """The parameters of a model's blocks and pools that are multiplied or added to a product."""
    for module, block in _layers(model):
        for name in block.products.get(plain_type(module), ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield module, parameter


def _layers_opened_as(
    model: nn.Module, kind: type[Opened]
) -> Iterator[tuple[nn.Module, BlockBase]]:
    """Those of the modules that are not opened yet, and would be as such a kind."""
    for module, block in _layers(model):
        if issubclass(block.opened.get(type(module), Opened), kind):
            yield module, block


def _attentions(model: nn.Module) -> Iterator[tuple[nn.Module, BlockBase]]:
    """The attentions of a model's blocks and pools that can be opened, each with such a block."""
    yield from _layers_opened_as(model, OpenedPool)
    for _, blocks in _towers(model):
        for block in blocks:
            if isinstance(block.attention, nn.Module):
                try:
                    block.check_attention()
                except TypeError:  # of a kind that stays as it is
                    continue
                yield block.attention, block


def _towers(model: nn.Module) -> Iterator[tuple[Any, list[BlockBase]]]:
    """The towers that can be opened, with their blocks."""
    for kind in ("visual", "text"):
        try:
            tower = open_tower(model, kind)
        except (TypeError, ValueError):  # of an unknown kind, or there is none
            continue
        known: list[BlockBase] = [block for block in tower.blocks if isinstance(block, BlockBase)]
        if known:
            yield tower, known
