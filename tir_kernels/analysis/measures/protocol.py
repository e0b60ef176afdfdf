"""The seam between measures and towers: what a measure sees of a block, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from tir_kernels.towers.protocol import AttentionCall


class BlockView(NamedTuple):
    """One block in one forward pass of B images.

    Attributes:
        block: Number of the block, from 0.
        hidden: (B, L, D), the tokens that entered it.
        call: Its attention, as all adapters left it.
        num_prefix_tokens: P of the L tokens are class token and registers.
    """

    block: int
    hidden: Tensor
    call: AttentionCall
    num_prefix_tokens: int


class Finding(NamedTuple):
    """A number for each image, in one block.

    Attributes:
        name: Quantity, with what tells it from the measure's others.
        block: Number of the block.
        values: (B,) float32.
        chance: The value under uniform attention, or random labels, as the measure says.
    """

    name: str
    block: int
    values: Tensor
    chance: float


class Measure(Protocol):
    """A measure of blocks; its fields, if any, are its settings.

    Attributes:
        name: Name in the registry.
    """

    name: str

    def of_block(self, view: BlockView) -> Iterable[Finding]:
        """The measure's findings in one block, without gradients."""
