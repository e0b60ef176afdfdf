"""open_clip's image tower."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers.open_clip.blocks import OpenClipBlock, blocks_of
from tir_kernels.towers.opening import plain_type
from tir_kernels.towers.run import features_of_patches, joint_space_of, unchanged_tokens


class OpenClipVision:
    """open_clip's VisionTransformer."""

    num_prefix_tokens = 1  # _embeds puts the class token in front, whatever is pooled
    compared_tokens = unchanged_tokens
    patch_features = features_of_patches

    def __init__(self, module: Any, path: str) -> None:
        self.module = module
        self._path = path

    @property
    def blocks(self) -> list[OpenClipBlock]:
        return blocks_of(self.module.transformer, self._path)

    @property
    def reads(self) -> int | None:
        return 1 if self.module.pool_type == "tok" else None

    @property
    def joint_space(self) -> JointSpace:
        return joint_space_of(self.module.ln_post, self.module.proj)

    def embed(self, images: Tensor) -> Tensor:
        return self.module._embeds(images)

    def norm_pre(self, tokens: Tensor) -> Tensor:
        """What tokens with positions go through in front of the first block, each alone."""
        return self.module.ln_pre(tokens)

    @property
    def final_projection(self) -> Tensor | None:
        return self.module.proj

    def unprojected(self, hidden: Tensor) -> Tensor:
        pooled, _ = self.module._pool(hidden)
        return pooled

    def pool(self, hidden: Tensor) -> Tensor:
        pooled = self.unprojected(hidden)
        return pooled if self.module.proj is None else pooled @ self.module.proj


class AttentionPooledVision(OpenClipVision):
    """open_clip's VisionTransformer that pools its tokens by attention, as CoCa's does."""

    @property
    def reads(self) -> None:
        return None

    @property
    def pools(self) -> list[nn.Module]:
        pools = (self.module.attn_pool, self.module.attn_pool_contrastive)
        return [pool for pool in pools if pool is not None]

    @property
    def joint_space(self) -> JointSpace:
        if self.module.attn_pool_contrastive is not None:  # its ln_post is in front of the pool
            return JointSpace(norm_eps=None, proj=self.module.proj)
        return joint_space_of(self.module.ln_post, self.module.proj)

    def compared_tokens(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, E), what the pool makes of each token alone."""
        tower = self.module
        home = tower.attn_pool.query.device  # not the tokens' in a replica of nn.DataParallel
        tokens = hidden.to(home)
        if tower.attn_pool_contrastive is None:
            return _pool_each(tower.attn_pool, tokens).to(hidden.device)
        tokens = tower.ln_post(tokens)
        if tower.attn_pool_type == "cascade":
            tokens = _pool_each(tower.attn_pool, tokens)
        return _pool_each(tower.attn_pool_contrastive, tokens).to(hidden.device)

    def unprojected(self, hidden: Tensor) -> Tensor:
        pooled = super().unprojected(hidden)
        # The pool of its own for images has one query, which open_clip keeps as an axis.
        return pooled if self.module.attn_pool_contrastive is None else pooled.squeeze(1)


def _pool_each(pooler: AttentionalPooler, tokens: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, E): the pool of each token alone, alike for all of its queries."""
    attention, width = pooler.attn, pooler.attn.embed_dim
    is_packed = attention._qkv_same_embed_dim
    weight = attention.in_proj_weight[2 * width :] if is_packed else attention.v_proj_weight
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    return attention.out_proj(F.linear(pooler.ln_k(tokens), weight, bias))


def vision_of(tower: Any, path: str) -> OpenClipVision:
    """An opened VisionTransformer, by how it pools.

    Raises:
        ValueError: It pools by an attention that isn't open_clip's.
    """
    if tower.attn_pool is None:
        return OpenClipVision(tower, path)
    for pooler in (tower.attn_pool, tower.attn_pool_contrastive):
        if pooler is not None and plain_type(pooler) is not AttentionalPooler:
            raise ValueError(
                f"model pools its image tokens by a {type(pooler).__name__}; what that makes of a "
                "single token is known of open_clip's AttentionalPooler alone"
            )
    return AttentionPooledVision(tower, path)
