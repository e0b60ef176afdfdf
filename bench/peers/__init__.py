"""The implementations that compete: ours through the public functions, and PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch import config as functorch_config

from bench.problems import Forward, Problem
from bench.settings import DIRECTIONS, OURS, Settings

EAGER = "eager"
COMPILED = "torch.compile"


@dataclass(frozen=True)
class Peer:
    """One way to compute an operator.

    Args:
        name: As in the records.
        build: Problem -> the forward pass as a function without arguments.
        unavailable: Why it cannot take part, if that is known.
        directions: What it can do.
        is_weighted: Whether it computes the weighted function, or the one without weights, which
            shows the price of weights.
        is_compiled: Whether it is compiled for each shape it meets.
        score_tensors: How many (B, H, L, L) tensors of float32 a forward pass holds, roughly.
    """

    name: str
    build: Callable[[Any], Forward]
    unavailable: str = ""
    directions: tuple[str, ...] = DIRECTIONS
    is_weighted: bool = True
    is_compiled: bool = False
    score_tensors: int = 0


def own_peers(
    settings: Settings, build: Callable[[str, Any], Forward], reference_scores: int = 0
) -> list[Peer]:
    """Every backend of ours; the reference holds ``reference_scores`` tensors of scores."""
    return [
        Peer(
            OURS + name,
            functools.partial(build, name),
            reason,
            score_tensors=reference_scores if name == "reference" else 0,
        )
        for name, reason in settings.our_backends()
    ]


def plain_peers(
    formula: Callable[..., Any], settings: Settings, score_tensors: int = 0
) -> list[Peer]:
    """A formula of the problem's arguments as it is, and compiled."""

    def eager(problem: Problem) -> Forward:
        return functools.partial(formula, *problem.arguments)

    def compiled_whole(problem: Problem) -> Forward:
        return functools.partial(compiled(formula), *problem.arguments)

    reason = settings.why_not_compiled
    return [
        Peer(EAGER, eager, score_tensors=score_tensors),
        Peer(COMPILED, compiled_whole, reason, is_compiled=True, score_tensors=score_tensors),
    ]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for exactly the shapes it meets, as a whole."""
    # Backward passes are timed over and over on the graph of one forward pass, which is refused
    # where the compiled backward pass may overwrite what was saved for it.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)
