"""Towers run in parts, without what does not reach the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tir_kernels import JointSpace
from tir_kernels.scalars import whole_number
from tir_kernels.towers.find import vision_tower
from tir_kernels.towers.protocol import Block, TextTower, VisionTower


class ProjectingTower(VisionTower, Protocol):
    """An image tower that may end with a projection: ``pool(h) = unprojected(h) @ projection``."""

    @property
    def final_projection(self) -> Tensor | None: ...  # (D, E); None: it ends otherwise
    def unprojected(self, hidden: Tensor) -> Tensor: ...  # (B, L, D) -> (B, D)


class ImageEncoder:
    """The image tower in two parts: the frozen patch embedding, and all that follows.

    Args:
        model: A model whose image tower can be opened, or that tower.
        class_token_only: Let the last block compute the class token alone where that is all the
            tower pools: exact, since no other token of that block is read.
        checkpoint: Keep only what enters each block for the backward pass, which computes the rest
            again: less memory, a third more work.
    """

    def __init__(
        self,
        model: nn.Module | VisionTower,
        class_token_only: bool = True,
        checkpoint: bool = False,
    ) -> None:
        self._tower = vision_tower(model)
        self._class_token_only = class_token_only
        self._checkpoint = checkpoint

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, D), what enters the first block."""
        return self._tower.embed(images)

    @property
    def projection(self) -> Tensor | None:
        """(D, E) with which ``features`` are ``unprojected @ projection``; ``None``: there is none,
        or the tower's family does not say.
        """
        return getattr(self._tower, "final_projection", None)

    def features(self, tokens: Tensor) -> Tensor:
        """(N, L, D) that enter the first block -> (N, E) image features."""
        return self._tower.pool(self._pooled_tokens(tokens))

    def unprojected(self, tokens: Tensor) -> Tensor:
        """(N, L, D) that enter the first block -> (N, D) before ``projection``, if there is one."""
        tower = cast(ProjectingTower, self._tower)
        return tower.unprojected(self._pooled_tokens(tokens))

    def _pooled_tokens(self, tokens: Tensor) -> Tensor:
        """(N, L, D) that enter the first block -> those that the pool reads."""
        *blocks, last = self._tower.blocks
        hidden = self._run(blocks, tokens)
        count, first = self._tower.reads, None
        if self._class_token_only and count is not None:
            first = last.first_tokens(hidden, count)
        return last(hidden) if first is None else first

    def patch_features(self, tokens: Tensor) -> Tensor:
        """(N, L, D) that enter the first block -> (N, patches, E) in the joint space."""
        return self._tower.patch_features(self._run(self._tower.blocks, tokens))

    def _run(self, blocks: Sequence[Block], tokens: Tensor) -> Tensor:
        hidden = tokens
        for block in blocks:
            if self._checkpoint and torch.is_grad_enabled():
                hidden = _checkpointed(block, hidden)
            else:
                hidden = block(hidden)
        return hidden


def _checkpointed(block: Block, hidden: Tensor) -> Tensor:
    # Reading the state of random numbers is not allowed while a graph is captured.
    is_captured = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    return checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=not is_captured)


class EncodesText(TextTower, Protocol):
    """The run through a text tower's blocks, for a family's tower to inherit."""

    def encode(
        self,
        embeddings: Tensor,
        last_position: Tensor,
        layer: int | None = None,
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the tower on token embeddings.

        Args:
            embeddings: (C, T, W), without positional embeddings, T at most the context length.
            last_position: (C,) position that stands for the text.
            layer: Also embed the output of this block; ``None``: of the last one.
            key_mask: The tower's ``key_mask`` of the token ids.

        Returns:
            (C, E) class embeddings of the last block and (C, E) of block ``layer``.

        Raises:
            ValueError: There is no block ``layer``, or the tower masks keys and ``key_mask`` is
                ``None``.
        """
        blocks = self.blocks
        if layer is not None:
            layer = whole_number("layer", layer, "a whole number or None")
            if not 0 <= layer < len(blocks):
                raise ValueError(f"layer must lie between 0 and {len(blocks) - 1}; got {layer}")
        hidden = self.start(embeddings)
        mask = self.mask(hidden.shape[1], key_mask)
        intermediate = None
        for index, block in enumerate(blocks):
            hidden = block(hidden, mask)
            if index == layer:
                intermediate = hidden
        final = self.pool(hidden, last_position)
        return final, final if intermediate is None else self.pool(intermediate, last_position)


def joint_space_of(norm: nn.Module, projection: Tensor | None) -> JointSpace:
    """The joint space after a tower's final norm, if it is a LayerNorm, and projection."""
    if isinstance(norm, nn.LayerNorm):
        return JointSpace(norm.weight, norm.bias, norm.eps, projection)
    return JointSpace(norm_eps=None, proj=projection)


def unchanged_tokens(tower: VisionTower, hidden: Tensor) -> Tensor:
    """(B, L, D) tokens of a block as they are, where the joint space is all that follows them.

    It is the ``compared_tokens`` of towers that pool without parameters. A tower that pools by
    attention gives (B, L, K): what its pool makes of each token alone, up to the part of it that is
    a joint space. A softmax over one key is 1, so that is the pool's value and output projections.
    """
    return hidden


def features_of_patches(tower: VisionTower, hidden: Tensor) -> Tensor:
    """(B, L, D) tokens of a block -> (B, patches, E) in the tower's joint space."""
    space = tower.joint_space
    patches = tower.compared_tokens(hidden[:, tower.num_prefix_tokens :])
    if space.norm_eps is not None:
        width = patches.shape[-1:]
        patches = F.layer_norm(patches, width, space.norm_weight, space.norm_bias, space.norm_eps)
    return patches if space.proj is None else patches @ space.proj
