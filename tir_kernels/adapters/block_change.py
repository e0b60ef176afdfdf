"""Changes of the forward pass of some vision blocks: what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from tir_kernels.adapters.handle import Handle
from tir_kernels.scalars import whole_number
from tir_kernels.towers.protocol import Block, Modifier, VisionTower


class BlockChange(Handle):
    """Handle of a change of some vision blocks, in training and evaluation.

    As a context manager it removes itself at the end. It is a setting of the model, as a
    re-weighting is: threads that use the model at once share it.

    Args:
        tower: The opened tower.
        layers: Its blocks that are changed.

    Attributes:
        layers: As given.
        backend: Backend of the attention, and of what is read of it.
    """

    changes_attention: ClassVar[bool] = True  # or what enters the blocks alone

    def __init__(self, tower: VisionTower, layers: Sequence[int], backend: str = "auto") -> None:
        self.layers = tuple(layers)
        self.backend = backend
        self._num_prefix_tokens = tower.num_prefix_tokens
        blocks = tower.blocks
        self._places = [_Place(self, blocks[layer], layer) for layer in self.layers]
        try:
            for place in self._places:
                place.block.put(place, self.changes_attention)
        except TypeError:  # and a block that cannot be opened leaves none changed
            self.remove()
            raise

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        """What enters a block in place of tokens (B, L, D), and the change of its attention."""
        raise NotImplementedError

    def remove(self) -> None:
        for place in self._places:
            place.block.take(place)
        self._places = []


class _Place:
    """The part of a change that is on one block."""

    def __init__(self, handle: BlockChange, block: Block, layer: int) -> None:
        self.handle = handle
        self.block = block
        self.layer = layer
        self.backend = handle.backend

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        return self.handle.enter(self.block, self.layer, hidden)


def resolved_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks of a tower, counted from 0.

    Args:
        layers: Blocks, negative ones counted from the end.
        depth: The number of blocks.

    Raises:
        ValueError: There is no such block, or one is named twice.
        TypeError: Something else than whole numbers.
    """
    resolved = []
    for layer in layers:
        layer = whole_number("layers", layer, "whole numbers")
        if not -depth <= layer < depth:
            raise ValueError(f"layers must lie between 0 and {depth - 1}; got {layer}")
        resolved.append(layer % depth)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"layers must name each block once; got {tuple(layers)}")
    return tuple(resolved)


def default_layers(depth: int) -> tuple[int, ...]:
    """The blocks that re-weighting and its controls change: 8 and 10 of 12 (arXiv 2605.25799).

    Raises:
        ValueError: The tower is too shallow.
    """
    if depth < 4:
        raise ValueError(
            f"layers must be given for a tower of {depth} blocks: the default is depth - 4 and "
            "depth - 2"
        )
    return depth - 4, depth - 2
