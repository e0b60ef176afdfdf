"""Other choices of the tokens that a re-weighting weighs: controls for the choice by relevance.

Counts and weights stay those that relevance gives an image in a block; only the patches that have
them are others. They are handed out in an order of the patches: the first gets the highest count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tir_kernels import attention_statistics
from tir_kernels.operators.choose import backend_with
from tir_kernels.towers.protocol import Block


class PatchOrder(Protocol):
    """An order of the patches of each image in a block."""

    def __call__(self, block: Block, layer: int, hidden: Tensor, num_prefix_tokens: int) -> Tensor:
        """(B, N) int64, the patches from the first to the last.

        Args:
            block: The block.
            layer: Its number.
            hidden: (B, L, D), what enters it.
            num_prefix_tokens: L - N.
        """
        ...


class MostAttended:
    """Patches by the attention that they receive in the block without weights, most first.

    It is the mean over all heads and queries, as the arm's own queries and keys are at that step;
    equal ones keep their order.
    """

    def __call__(self, block: Block, layer: int, hidden: Tensor, num_prefix_tokens: int) -> Tensor:
        call = block.attention_of(hidden)
        # Without a prefix, "from patches" is the mean over all queries.
        found = attention_statistics(
            call.query,
            call.key,
            scale=call.scale,
            num_prefix_tokens=0,
            backend=backend_with(call.backend, "attention_statistics"),
        )
        received = found.received_from_patches.mean(1)[:, num_prefix_tokens:]
        return received.argsort(dim=1, descending=True, stable=True)


class RandomOrder:
    """A random order for each of G episodes and each block, the same for all images and steps.

    Args:
        seeds: G seeds; image b of B belongs to number ``b // (B / G)``.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)
        # Made once: a CUDA graph can't copy anew what is drawn on the CPU.
        self._orders: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, block: Block, layer: int, hidden: Tensor, num_prefix_tokens: int) -> Tensor:
        patches = hidden.shape[1] - num_prefix_tokens
        key = (layer, patches, hidden.device)
        if key not in self._orders:
            drawn = [self.draw(seed, layer, patches) for seed in self._seeds]
            self._orders[key] = torch.stack(drawn).to(hidden.device)
        orders = self._orders[key]
        return orders.repeat_interleave(len(hidden) // len(orders), 0)

    @staticmethod
    def draw(seed: int, layer: int, patches: int) -> Tensor:
        """(N,) int64, the order of a seed in a block."""
        generator = torch.Generator("cpu").manual_seed((seed + 1) * 1009 + layer)
        return torch.randperm(patches, generator=generator, device="cpu")


def hand_out(values: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """Values of patches, given to others: those of the highest counts to the first of an order.

    Args:
        values: (B, N), what is handed out; gradients flow to it.
        counts: (B, N).
        order: (B, N) int64, patches.

    Returns:
        (B, N).
    """
    by_count = counts.argsort(dim=1, descending=True, stable=True)
    source = torch.empty_like(order).scatter_(1, order, by_count)
    return values.gather(1, source)
