"""LoRA on the query, key and value projections of a model's towers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels.adapters.handle import Handle, handles_on
from tir_kernels.adapters.low_rank import LowRank, LowRankSettings, PhiloxRandomness
from tir_kernels.adapters.one_pass import one_pass
from tir_kernels.precision import autocast_dtype
from tir_kernels.scalars import finite_number, real_number, whole_number
from tir_kernels.towers import open_tower
from tir_kernels.towers.protocol import Block, Linear

TOWERS = ("visual", "text")
PROJECTIONS = ("q", "k", "v")


class Place:
    """The projections of one block that are packed into one matrix, and their low-rank change."""

    def __init__(self, block: Any, names: list[str], linear: Linear) -> None:
        self.block = block
        self.names = names
        self.linear = linear

    @property
    def low_rank(self) -> LowRank:
        return self.linear.owner.low_rank  # type: ignore[return-value]

    @property
    def path(self) -> str:
        """Path of the owner in the model."""
        attention: Any = self.block.attention
        inner = next(n for n, each in attention.named_modules() if each is self.linear.owner)
        return f"{self.block.attention_path}.{inner}".rstrip(".")

    @property
    def weight(self) -> Tensor:
        """(K O, D), the frozen weight of all of the owner's projections."""
        owner = self.linear.owner
        return owner.in_proj_weight if isinstance(owner, nn.MultiheadAttention) else owner.weight  # type: ignore[return-value]


def packed(block: Block) -> Iterator[Place]:
    """The block's projections by the module that owns them."""
    owners: dict[int, list[str]] = {}
    linears = block.linears
    for name in PROJECTIONS:
        owners.setdefault(id(linears[name].owner), []).append(name)
    for names in owners.values():
        yield Place(block, names, linears[names[0]])


class LoRA(Handle):
    """Handle of :func:`add_lora`; as a context manager it removes itself at the end.

    Attributes:
        rank, alpha, dropout, backend: As given.
        module_paths: ``"{visual|text}.{layer}"`` -> path of the block's attention in the model.
        places: ``"{visual|text}.{layer}"`` -> the projections of the block.
    """

    def __init__(self, blocks: dict[str, Block], settings: LowRankSettings) -> None:
        self.rank = settings.rank
        self.alpha = settings.alpha
        self.dropout = settings.dropout
        self.backend = settings.backend
        self.module_paths = {place: block.attention_path for place, block in blocks.items()}
        self._step = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.places: dict[str, list[Place]] = {}
        try:
            for name, block in blocks.items():
                for place in packed(block):
                    owner = place.linear.owner
                    device = next(owner.parameters()).device
                    low_rank = LowRank(place.linear.shape, settings, device)
                    low_rank.train(owner.training)
                    block.put_low_rank(owner, low_rank, self)
                    self.places.setdefault(name, []).append(place)
        except (TypeError, RuntimeError):
            self.remove()
            raise

    def parameters(self) -> Iterator[nn.Parameter]:
        for low_rank in self._low_ranks():
            yield from low_rank.parameters()

    def owners(self) -> list[nn.Module]:
        """The modules that hold the low-rank changes, in the order of :meth:`factors`."""
        return [place.linear.owner for places in self.places.values() for place in places]

    def weights(self) -> list[Tensor]:
        """The model's own weights that are changed, in the order of :meth:`owners`."""
        return [place.weight for places in self.places.values() for place in places]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``"{visual|text}.{layer}.{q|k|v}"`` -> A (rank, width) and B (width, rank), as views; of
        several episodes, with a leading dimension G.
        """
        return {
            f"{name}.{projection}": (
                place.low_rank.a.select(-3, index),
                place.low_rank.b.select(-3, index),
            )
            for name, places in self.places.items()
            for place in places
            for index, projection in enumerate(place.names)
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
        device = low_ranks[0].a.device
        with torch.inference_mode(False):  # the step is changed in place, in training too
            on_device = torch.tensor(seeds, dtype=torch.int64, device=device)
            self._step = torch.zeros(1, dtype=torch.int64, device=device)
        for stream, low_rank in enumerate(low_ranks):
            low_rank.draw(generators)
            low_rank.randomness = PhiloxRandomness(on_device, self._step, stream)

    def next_step(self) -> None:
        """Let dropout, once seeded, draw anew."""
        self._step += 1

    @contextmanager
    def one_pass(self) -> Iterator[list[Tensor]]:
        """Convert all factors at once to the type of the autocast region around the context.

        For one forward pass: the factors, and the step of seeded dropout, must not change inside of
        it. Results are the same as without; on a GPU it saves launches. The context gives the
        tensors that were made.
        """
        low_ranks = self._low_ranks()
        dtype = autocast_dtype(low_ranks[0].a.device.type)
        if dtype is None:
            yield []
            return
        with one_pass(low_ranks, low_ranks[0].scaling, self._step, dtype) as made:
            yield made

    def form_products(self, mode: bool = True) -> None:
        """Multiply with B A as one matrix, as the formula is written, only to measure that."""
        for low_rank in self._low_ranks():
            low_rank.forms_product = mode

    def train(self, mode: bool = True) -> None:
        """Switch LoRA's dropout on or off, without touching the mode of the model."""
        for low_rank in self._low_ranks():
            low_rank.train(mode)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the change to the model's own weights, for good, and remove the handle.

        The model then computes the same, up to rounding, without LoRA.

        Raises:
            ValueError: Several episodes' factors can't be in one weight.
        """
        if any(low_rank.a.dim() == 4 for low_rank in self._low_ranks()):
            raise ValueError("LoRA of num_episodes can't be merged: add one without them")
        for places in self.places.values():
            for place in places:
                place.weight.add_(place.low_rank.product())
        self.remove()

    def remove(self) -> None:
        for places in self.places.values():
            for place in places:
                place.block.take_low_rank(place.linear.owner, self)
        self.places = {}

    def _low_ranks(self) -> list[LowRank]:
        return [place.low_rank for places in self.places.values() for place in places]


def loras_of(model: nn.Module) -> list[LoRA]:
    """The handles of the LoRA on a model: of a copy, or a model saved and loaded, its own."""
    return handles_on(model, LoRA)


def add_lora(
    model: Any,
    rank: int = 16,
    alpha: float = 8,
    dropout: float = 0.25,
    *,
    towers: Sequence[str] = TOWERS,
    passes_input_gradient: bool = True,
    num_episodes: int | None = None,
    backend: str = "auto",
) -> LoRA:
    """Add LoRA to the query, key and value projections of every block.

    The change of a projection is ``B A * alpha / sqrt(rank)`` with dropout in front of A while
    training; A is drawn as ``nn.Linear`` draws weights, B is zero. The model's own parameters are
    left as they are: freeze them yourself if they are not to be trained.

    Args:
        model: A model whose towers can be opened, or an opened tower.
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
        backend: Backend of the attention behind the changed projections, and of seeded dropout
            where it offers that.

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
    blocks = {
        f"{tower}.{layer}": block
        for tower in dict.fromkeys(towers)
        for layer, block in enumerate(open_tower(model, tower).blocks)
    }
    settings = LowRankSettings(rank, alpha, dropout, passes_input_gradient, num_episodes, backend)
    return LoRA(blocks, settings)
