"""LoRA on the query, key and value projections of an open_clip model's towers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels.adapters.low_rank import LowRank, PhiloxRandomness
from tir_kernels.scalars import finite_number, real_number, whole_number
from tir_kernels.towers.attention import SelfAttention, close_attention, open_attention
from tir_kernels.towers.open_clip import text_tower, vision_tower

TOWERS = ("visual", "text")
PROJECTIONS = ("q", "k", "v")


class LoRA:
    """Handle of :func:`add_lora`; as a context manager it removes itself at the end.

    Attributes:
        rank, alpha, dropout: As given.
        module_paths: ``"{visual|text}.{layer}"`` -> path of the block's attention in the model.
    """

    def __init__(
        self,
        blocks: dict[str, Any],  # "visual.3" -> block
        module_paths: dict[str, str],
        rank: int,
        alpha: float,
        dropout: float,
        passes_input_gradient: bool,
        num_episodes: int | None,
    ) -> None:
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.module_paths = module_paths
        self._blocks = blocks
        self._step = torch.zeros(1, dtype=torch.int64, device="cpu")
        opened: list[Any] = []
        try:
            for block in blocks.values():
                if getattr(block.attn, "low_rank", None) is not None:
                    raise RuntimeError(
                        "model has LoRA already: call remove() on the handle of its add_lora()"
                    )
                attention = open_attention(block)
                opened.append(block)
                weight = attention.in_proj_weight
                attention.low_rank = LowRank(
                    weight.shape[1],
                    rank,
                    alpha,
                    dropout,
                    passes_input_gradient,
                    weight.device,
                    num_episodes,
                )
                attention.low_rank.train(attention.training)
        except (TypeError, RuntimeError):
            for block in opened:
                block.attn.low_rank = None
                close_attention(block)
            raise

    def parameters(self) -> Iterator[nn.Parameter]:
        for low_rank in self._low_ranks().values():
            yield from low_rank.parameters()

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``"{visual|text}.{layer}.{q|k|v}"`` -> A (rank, width) and B (width, rank), as views; of
        several episodes, with a leading dimension G.
        """
        return {
            f"{place}.{projection}": (low_rank.a.select(-3, index), low_rank.b.select(-3, index))
            for place, low_rank in self._low_ranks().items()
            for index, projection in enumerate(PROJECTIONS)
        }

    @torch.no_grad()
    def set_factors(
        self, a: Mapping[str, Tensor] | None = None, b: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy values into A and B by the names of :meth:`factors`; others keep theirs.

        Raises:
            ValueError: An unknown name or a wrong shape.
        """
        factors = self.factors()
        for letter, index, given in (("A", 0, a), ("B", 1, b)):
            for name, value in (given or {}).items():
                if name not in factors:
                    raise ValueError(
                        f"{name!r} names no LoRA factor; names look like {next(iter(factors))!r}"
                    )
                target = factors[name][index]
                if value.shape != target.shape:
                    raise ValueError(
                        f"LoRA {letter} of {name!r} must have shape {tuple(target.shape)}; "
                        f"got {tuple(value.shape)}"
                    )
                target.copy_(value)

    def seed(self, seeds: Sequence[int]) -> None:
        """Draw A anew, and let dropout depend on seed and step alone, which starts at 0.

        An episode then gets the random numbers that it would get without the others, on any device.

        Args:
            seeds: One an episode, each in [0, 2^63).
        """
        seeds = [whole_number("seeds", seed, "whole numbers") for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        low_ranks = self._low_ranks()
        device = next(iter(low_ranks.values())).a.device
        with torch.inference_mode(False):  # the step is changed in place, in training too
            on_device = torch.tensor(seeds, dtype=torch.int64, device=device)
            self._step = torch.zeros(1, dtype=torch.int64, device=device)
        for stream, low_rank in enumerate(low_ranks.values()):
            low_rank.draw(generators)
            low_rank.randomness = PhiloxRandomness(on_device, self._step, stream)

    def next_step(self) -> None:
        """Let dropout, once seeded, draw anew."""
        self._step += 1

    def form_products(self, mode: bool = True) -> None:
        """Multiply with B A as one matrix, as the formula is written, only to measure that."""
        for low_rank in self._low_ranks().values():
            low_rank.forms_product = mode

    def train(self, mode: bool = True) -> None:
        """Switch LoRA's dropout on or off, without touching the mode of the model."""
        for low_rank in self._low_ranks().values():
            low_rank.train(mode)

    def remove(self) -> None:
        """Leave the model as it was before; harmless if done already."""
        for block in self._blocks.values():
            block.attn.low_rank = None
            close_attention(block)
        self._blocks = {}

    def __enter__(self) -> LoRA:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _low_ranks(self) -> dict[str, LowRank]:
        attentions: dict[str, SelfAttention] = {p: b.attn for p, b in self._blocks.items()}
        return {p: a.low_rank for p, a in attentions.items() if a.low_rank is not None}


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 8,
    dropout: float = 0.25,
    *,
    towers: Sequence[str] = TOWERS,
    passes_input_gradient: bool = True,
    num_episodes: int | None = None,
) -> LoRA:
    """Add LoRA to the query, key and value projections of every block.

    The change of a projection is ``B A * alpha / sqrt(rank)`` with dropout in front of A while
    training; A is drawn as ``nn.Linear`` draws weights, B is zero. The model's own parameters are
    left as they are: freeze them yourself if they are not to be trained.

    Args:
        model: An open_clip model with open_clip's own towers.
        rank: At least 1.
        alpha: LoRA's alpha, any finite number.
        dropout: In [0, 1).
        towers: "visual", "text" or both.
        passes_input_gradient: Whether the low-rank branches pass a gradient on to earlier blocks.
            ``True`` is the gradient of the function; ``False`` is how the published few-shot
            program (arXiv 2605.25799) trains, where earlier blocks learn through the frozen
            projections alone.
        num_episodes: Train G sets of factors at once: the images, and the texts, of a forward pass
            fall into G equal parts, one after the other, each with factors of its own.

    Returns:
        A handle with ``parameters()``, ``factors()``, ``train()`` and ``remove()``.

    Raises:
        TypeError, ValueError: An unsuitable model or argument.
        RuntimeError: The model has LoRA already.
    """
    rank = whole_number("rank", rank)
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")
    if num_episodes is not None:
        num_episodes = whole_number("num_episodes", num_episodes, "an int or None")
        if num_episodes < 1:
            raise ValueError(f"num_episodes must be at least 1; got {num_episodes}")
    alpha, dropout = finite_number("alpha", alpha), real_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1); got {dropout}")
    unknown = set(towers) - set(TOWERS)
    if unknown or not towers:
        raise ValueError(f"towers must be some of {', '.join(TOWERS)}; got {tuple(towers)}")
    blocks: dict[str, Any] = {}
    module_paths: dict[str, str] = {}
    for tower in dict.fromkeys(towers):
        path, transformer = tower_transformer(model, tower)
        for layer, block in enumerate(transformer.resblocks):
            blocks[f"{tower}.{layer}"] = block
            module_paths[f"{tower}.{layer}"] = f"{path}.resblocks.{layer}.attn"
    return LoRA(blocks, module_paths, rank, alpha, dropout, passes_input_gradient, num_episodes)


def tower_transformer(model: nn.Module, tower: str) -> tuple[str, Any]:
    """Path in the model of the transformer of tower "visual" or "text", and the transformer.

    Raises:
        TypeError, ValueError: The tower is of a kind that takes no LoRA.
    """
    if tower == "text":
        text = text_tower(model)
        return text.prefix, text.transformer
    visual = vision_tower(model)
    return "transformer" if visual is model else "visual.transformer", visual.transformer
