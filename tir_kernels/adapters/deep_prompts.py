"""Deep prompts: learned tokens beside a tower's own, given anew to each of its first blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tir_kernels.adapters.handle import Handle
from tir_kernels.scalars import whole_number
from tir_kernels.towers import text_tower, vision_tower
from tir_kernels.towers.protocol import Block, Modifier, VisionTower
from tir_kernels.towers.run import EncodesText

# (B, L, D) that enter a block and its prompts (B, n, D) -> what the block gets.
_Place = Callable[[Tensor, Tensor], Tensor]


class DeepPrompts(Handle):
    """Handle of :func:`add_image_prompts` and :func:`add_text_prompts`.

    It is a setting of the model: threads that use the model at once share its prompts.
    """

    def __init__(self, blocks: Sequence[Block], places: Sequence[_Place]) -> None:
        self._prompts: Tensor | None = None
        self._places = [
            (block, _PromptedBlock(self, position, place))
            for position, (block, place) in enumerate(zip(blocks, places, strict=True))
        ]
        try:
            for block, adapter in self._places:
                block.put(adapter, False)
        except TypeError:  # and a block that cannot be opened leaves none changed
            self.remove()
            raise

    def set_prompts(self, prompts: Tensor) -> None:
        """Set the prompts; needed before the first forward pass. Gradients flow to them.

        Args:
            prompts: (J, G, n, D), of each block that takes some, for G groups of images or texts:
                of a batch of B, b belongs to group ``b // (B / G)``.

        Raises:
            ValueError: Another shape.
        """
        if prompts.dim() != 4 or len(prompts) != len(self._places) or 0 in prompts.shape[1:3]:
            raise ValueError(
                f"prompts must have shape ({len(self._places)}, G, n, D), with G and n of at least "
                f"1; got {tuple(prompts.shape)}"
            )
        self._prompts = prompts

    def prompts_of(self, position: int, hidden: Tensor) -> Tensor:
        """(B, n, D) of the block at a position, in the type of what enters it, (B, L, D)."""
        if self._prompts is None:
            raise RuntimeError(
                "prompts are not set: call handle.set_prompts((J, G, n, D) tensor) before the "
                "model's first forward pass"
            )
        own = self._prompts[position]
        if len(hidden) % len(own):
            raise ValueError(
                f"prompts are those of {len(own)} groups, into which a batch of {len(hidden)} does "
                "not divide"
            )
        each = own[:, None].expand(-1, len(hidden) // len(own), -1, -1)
        return each.flatten(0, 1).to(hidden)

    def remove(self) -> None:
        for block, adapter in self._places:
            block.take(adapter)
        self._places = []


class _PromptedBlock:
    """The part of deep prompts that is on one block."""

    def __init__(self, handle: DeepPrompts, position: int, place: _Place) -> None:
        self.handle = handle
        self._position = position
        self._place = place

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        return self._place(hidden, self.handle.prompts_of(self._position, hidden)), None


class _Append:
    """Prompts behind the tokens, through what each token goes through before the first block."""

    def __init__(self, norm_pre: Callable[[Tensor], Tensor]) -> None:
        self._norm_pre = norm_pre

    def __call__(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        return torch.cat([hidden, self._norm_pre(prompts).to(hidden)], 1)


class _Replace:
    """Prompts in place of tokens: those from a place on, or without one the last."""

    def __init__(self, first: int | None) -> None:
        self._first = first

    def __call__(self, hidden: Tensor, prompts: Tensor) -> Tensor:
        count = prompts.shape[1]
        first = hidden.shape[1] - count if self._first is None else self._first
        return torch.cat([hidden[:, :first], prompts, hidden[:, first + count :]], 1)


def add_image_prompts(model: nn.Module | VisionTower, depth: int) -> DeepPrompts:
    """Append prompts to the tokens of an image tower, replaced before each of its first blocks.

    The first block's are appended behind the patches, without positions, as they would be in front
    of the tower's first norm; those of each block up to block depth - 1 take their places. Other
    adapters on those blocks and on later ones see them as patches.

    Args:
        model: A model whose image tower can be opened, or that tower; it must pool the first tokens
            alone, such as the class token.
        depth: J, blocks that take prompts; at least 1.

    Returns:
        A handle: ``set_prompts((J, G, n, D))`` before the first forward pass, ``remove()`` to
        restore the model.

    Raises:
        TypeError, ValueError: An unsuitable tower or depth.
        RuntimeError: The tower has prompts already.
    """
    tower = vision_tower(model)
    norm_pre = getattr(tower, "norm_pre", None)  # towers need not have it
    if norm_pre is None or tower.reads is None:
        raise TypeError(
            "deep prompts need an image tower that pools its class token alone, and whose "
            "positions are not rotary: others would take the prompts for patches; choose an "
            "architecture such as ViT-B-16"
        )
    blocks = _first_blocks(tower, depth)
    return DeepPrompts(blocks, [_Append(norm_pre), *(_Replace(None) for _ in blocks[1:])])


def add_text_prompts(model: nn.Module | EncodesText, depth: int, first: int) -> DeepPrompts:
    """Replace tokens of texts by prompts before each of a text tower's first blocks but block 0.

    What enters block 0 are the texts' own embeddings; ``PromptContext`` puts learned ones there.

    Args:
        model: A model whose text tower can be opened, or that tower.
        depth: J, blocks that take prompts, block 0 with the embeddings' included; at least 1.
        first: The place in a text of the first token that is replaced.

    Returns:
        A handle: ``set_prompts((J - 1, G, n, W))`` before the first forward pass, ``remove()`` to
        restore the model.

    Raises:
        TypeError, ValueError: An unsuitable tower, depth or place.
        RuntimeError: The tower has prompts already.
    """
    first = whole_number("first", first)
    if first < 0:
        raise ValueError(f"first must be at least 0; got {first}")
    blocks = _first_blocks(text_tower(model), depth)[1:]
    return DeepPrompts(blocks, [_Replace(first) for _ in blocks])


def _first_blocks(tower: VisionTower | EncodesText, depth: int) -> Sequence[Block]:
    blocks = tower.blocks
    depth = whole_number("depth", depth)
    if not 1 <= depth <= len(blocks):
        raise ValueError(f"depth must lie between 1 and {len(blocks)}, its blocks; got {depth}")
    if any(isinstance(each, _PromptedBlock) for block in blocks for each in block.adapters):
        raise RuntimeError("model has deep prompts already: call remove() on their handle")
    return blocks[:depth]
