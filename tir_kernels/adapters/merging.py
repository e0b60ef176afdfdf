"""LoRA's change in the weights themselves, for a model that is used and not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels.adapters.lora import add_lora


@contextmanager
def merged_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
) -> Iterator[None]:
    """Add LoRA's products to the weights of a model until the context ends.

    The results are those of the branches up to rounding. Afterwards, each bit is as it was.

    Args:
        model: A model whose towers can be opened, frozen, in float32.
        rank, alpha: As for ``add_lora``.
        a, b: Factors by the names of ``LoRA.factors``.

    Raises:
        TypeError, ValueError: An unsuitable model, or factors that do not fit it.
        RuntimeError: The model has LoRA on it.
    """
    originals: list[tuple[nn.Parameter, Tensor]] = []
    changed: list[Tensor] = []
    with add_lora(model, rank, alpha, 0.0) as lora, torch.no_grad():
        lora.set_factors(a, b)
        for owner in lora.owners():
            low_rank: Any = owner.low_rank
            weight = _weight(owner)
            product = torch.matmul(low_rank.b, low_rank.a).flatten(0, 1)
            originals.append((weight, weight.data))
            changed.append(weight.data + (product * low_rank.scaling).to(weight.dtype))
    try:
        for (weight, _), value in zip(originals, changed, strict=True):
            weight.data = value
        yield
    finally:
        for weight, value in originals:
            weight.data = value


def _weight(owner: Any) -> nn.Parameter:
    """The matrix whose product a module's low-rank change is added to."""
    packed = getattr(owner, "in_proj_weight", None)
    return owner.weight if packed is None else packed
