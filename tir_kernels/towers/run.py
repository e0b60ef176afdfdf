"""Image features, without what does not reach them."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tir_kernels.towers.attention import SelfAttention
from tir_kernels.towers.open_clip import vision_tower


class ImageEncoder:
    """The image tower in two parts: the frozen patch embedding, and all that follows.

    Args:
        model: An open_clip model with open_clip's own VisionTransformer.
        class_token_only: Let the last block compute the class token alone where that is all the
            tower pools: exact, since no other token of that block is read.
        checkpoint: Keep only what enters each block for the backward pass, which computes the rest
            again: less memory, a third more work.
    """

    def __init__(
        self, model: nn.Module, class_token_only: bool = True, checkpoint: bool = False
    ) -> None:
        self._tower: Any = vision_tower(model)
        self._class_token_only = class_token_only
        self._checkpoint = checkpoint

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, L, D), what enters the first block."""
        return self._tower._embeds(images)

    def features(self, tokens: Tensor) -> Tensor:
        """(N, L, D) that enter the first block -> (N, E) image features."""
        tower = self._tower
        transformer = tower.transformer
        *blocks, last = transformer.resblocks
        hidden = tokens if transformer.batch_first else tokens.transpose(0, 1)
        for block in blocks:
            if self._checkpoint and torch.is_grad_enabled():
                hidden = _checkpointed(block, hidden)
            else:
                hidden = block(hidden)
        if self._class_token_only and self._needs_class_token_only(last):
            hidden = _class_token(last, hidden)
        else:
            hidden = last(hidden)
        if not transformer.batch_first:
            hidden = hidden.transpose(0, 1)
        pooled, _ = tower._pool(hidden)
        return pooled if tower.proj is None else pooled @ tower.proj

    def _needs_class_token_only(self, block: Any) -> bool:
        return (
            self._tower.pool_type == "tok"
            and self._tower.transformer.batch_first
            and type(block) is ResidualAttentionBlock
            and isinstance(block.attn, SelfAttention)
            and "forward" not in vars(block)  # a re-weighted block needs its tokens
        )


def _checkpointed(block: Any, hidden: Tensor) -> Tensor:
    # Reading the state of random numbers is not allowed while a graph is captured.
    is_captured = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    return checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=not is_captured)


def _class_token(block: ResidualAttentionBlock, hidden: Tensor) -> Tensor:
    """(N, L, D) -> (N, 1, D), the block's output for the first token."""
    attended = block.attn.first_token(block.ln_1(hidden))
    token = hidden[:, :1] + block.ls_1(attended)
    return token + block.ls_2(block.mlp(block.ln_2(token)))
