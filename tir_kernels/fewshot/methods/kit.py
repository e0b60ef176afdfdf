"""What methods are given to build learners from, and what they give to be stepped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tir_kernels.towers import ImageEncoder


class Kit(NamedTuple):
    """The parts from which a method builds its learner, for G episodes that are trained at once."""

    model: nn.Module  # frozen, in evaluation mode
    tokenizer: Callable[[list[str]], Tensor]  # C texts -> (C, T) token ids
    encoder: ImageEncoder  # images (N, 3, H, W) -> tokens -> features (N, E)
    class_names: Sequence[Sequence[str]]  # G lists of C names, in words
    seeds: Sequence[int]  # G, the only source of an episode's random numbers
    shots: int  # support images per class, without their views
    views: int  # support images in a row that are views of one, itself included
    backend: str  # of the operators


class ParameterGroup(NamedTuple):
    """Parameters, and the name in ``torch.optim`` and settings of the optimizer that steps them."""

    parameters: Sequence[nn.Parameter]
    optimizer: str
    settings: Mapping[str, Any]
    schedule: Callable[[int], float] | None = None  # step, from 0 -> factor of lr, see schedules.py
