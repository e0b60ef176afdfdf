"""LoRA's change in the weights themselves, for a model that is used and not trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
    towers = tuple(dict.fromkeys(name.partition(".")[0] for name in a))
    with add_lora(model, rank, alpha, 0.0, towers=towers) as lora:
        lora.set_factors(a, b)
        originals = [(weight, weight.data) for weight in lora.weights()]
        for weight, value in originals:
            weight.data = value.clone()
        try:
            lora.merge()
            yield
        finally:
            for weight, value in originals:
                weight.data = value
