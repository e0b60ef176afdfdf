"""Noise of the image tower in training alone: attention switched off, and random registers.

What is drawn depends on the episode's seed and the step alone, as LoRA's dropout does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tir_kernels.adapters.block_change import BlockChange
from tir_kernels.adapters.registers import AppendedTokens
from tir_kernels.operators.choose import backend_with
from tir_kernels.operators.dropout import philox_dropout
from tir_kernels.towers import vision_tower
from tir_kernels.towers.protocol import AttentionCall, Block, Modifier, VisionTower

# Of random numbers; LoRA's layers count theirs from 0.
_TEMPERATURE_STREAM, _REGISTER_STREAM = 255, 254
_BITS = 24  # of a float32's fraction


class _Draws:
    """Random numbers of G episodes in a step, counted by Philox."""

    def __init__(self, seeds: Sequence[int], device: torch.device, backend: str) -> None:
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.backend = backend_with(backend, "philox_dropout")

    def is_dropped(
        self, shape: tuple[int, int, int], probability: float, stream: int, branch: int
    ) -> Tensor:
        """(G, *shape) bool, each with that probability."""
        ones = torch.ones(len(self.seeds), *shape, device=self.seeds.device)
        kept = philox_dropout(
            ones,
            self.seeds,
            self.step,
            stream=stream,
            first_branch=branch,
            probability=probability,
            backend=self.backend,
        )
        return kept[:, 0] == 0

    def normal(self, shape: tuple[int, int, int], stream: int) -> Tensor:
        """(G, *shape) of the standard normal distribution, by the inverse of its cumulative one."""
        whole = torch.zeros(len(self.seeds), *shape, device=self.seeds.device)
        for bit in range(_BITS):
            whole += 2.0**bit * self.is_dropped(shape, 0.5, stream, bit)
        middle = (2 * whole - 2.0**_BITS) + 1  # of -2^24 to 2^24, exactly
        return math.sqrt(2) * torch.erfinv(middle / 2.0**_BITS)


class TemperatureDropout(BlockChange):
    """Attention whose scores are 0 in some blocks of a training step, for each episode by itself.

    Args:
        tower: The opened tower.
        probability: Of a block's scores being 0, so that all tokens attend to all alike.
        seeds: G seeds; image b of B belongs to number ``b // (B / G)``.
        backend: Backend of the attention and of the random numbers.
    """

    def __init__(
        self, tower: VisionTower, probability: float, seeds: Sequence[int], backend: str
    ) -> None:
        self.probability = probability
        self.training = False
        blocks = tower.blocks
        self._draws = _Draws(seeds, _device_of(blocks[0]), backend)
        super().__init__(tower, range(len(blocks)), backend)

    def train(self, mode: bool = True) -> None:
        """Switch the noise on or off."""
        self.training = mode

    def next_step(self) -> None:
        """Draw anew."""
        self._draws.step += 1

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        if not self.training:
            return hidden, None
        is_off = self._draws.is_dropped((1, 1, 1), self.probability, _TEMPERATURE_STREAM, layer)

        def switch(call: AttentionCall, hidden: Tensor) -> AttentionCall:
            of_image = is_off.repeat_interleave(len(hidden) // len(is_off), 0)
            query = call.query * (~of_image).to(call.query.dtype)
            return call._replace(query=query, backend=self.backend)

        return hidden, switch


def add_temperature_dropout(
    model: nn.Module | VisionTower,
    probability: float,
    seeds: Sequence[int] = (0,),
    backend: str = "auto",
) -> TemperatureDropout:
    """Switch attention off at random while training: every block's scores are 0 in some steps.

    Args:
        model: A model whose image tower can be opened, or that tower.
        probability: Of it, for each block and step, in [0, 1).
        seeds: One for each of G equal parts of the batch.
        backend: Backend of the operators.

    Returns:
        A handle: ``train(mode)``, ``next_step()`` and ``remove()``. It is off at first.

    Raises:
        TypeError, ValueError: An unsuitable model or probability.
    """
    if not 0 <= probability < 1:
        raise ValueError(f"probability must lie in [0, 1); got {probability}")
    return TemperatureDropout(vision_tower(model), probability, seeds, backend)


class RandomRegisters(AppendedTokens):
    """Tokens of noise, ``|scale| N(0, 1)``, behind each image's own while training.

    Args:
        tower: The opened tower.
        registers: R, their number.
        scale: At first.
        seeds: G seeds; image b of B belongs to number ``b // (B / G)``.
        backend: Backend of the random numbers.

    Attributes:
        scale: (G,) parameter.
    """

    def __init__(
        self,
        tower: VisionTower,
        registers: int,
        scale: float,
        seeds: Sequence[int],
        backend: str,
    ) -> None:
        super().__init__(tower)
        self.training = False
        self.registers = registers
        device = _device_of(tower.blocks[0])
        with torch.inference_mode(False):
            self.scale = nn.Parameter(torch.full((len(seeds),), float(scale), device=device))
        self._draws = _Draws(seeds, device, backend)

    def train(self, mode: bool = True) -> None:
        """Switch the registers on or off."""
        self.training = mode

    def next_step(self) -> None:
        """Draw anew."""
        self._draws.step += 1

    @property
    def count(self) -> int:
        return self.registers if self.training else 0

    def tokens(self, hidden: Tensor) -> Tensor | None:
        if not self.count:
            return None
        batch, _, width = hidden.shape
        shape = batch // len(self.scale), self.registers, width
        noise = self._draws.normal(shape, _REGISTER_STREAM)
        return (self.scale.abs()[:, None, None, None] * noise).flatten(0, 1)


def add_random_registers(
    model: nn.Module | VisionTower,
    registers: int = 16,
    scale: float = 0.1,
    seeds: Sequence[int] = (0,),
    backend: str = "auto",
) -> RandomRegisters:
    """Append tokens of noise to each image's own while training, new in each step.

    Args:
        model: A model whose image tower can be opened, or that tower, without adapters on its
            blocks, LoRA aside.
        registers: Their number, at least 1.
        scale: Factor of the noise at first; ``handle.scale`` may be trained.
        seeds: One for each of G equal parts of the batch.
        backend: Backend of the random numbers.

    Returns:
        A handle: ``train(mode)``, ``next_step()`` and ``remove()``. They are off at first.

    Raises:
        TypeError, ValueError: An unsuitable model or number.
        RuntimeError: Adapters are on the blocks.
    """
    if registers < 1:
        raise ValueError(f"registers must be at least 1; got {registers}")
    return RandomRegisters(vision_tower(model), registers, scale, seeds, backend)


def _device_of(block: object) -> torch.device:
    return next(block.module.parameters()).device  # type: ignore[attr-defined]
