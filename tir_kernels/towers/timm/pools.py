"""timm's attention pool in the open."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from torch import Tensor

from tir_kernels.towers.attention import is_faster_than_pytorch, split_heads
from tir_kernels.towers.pools import OpenedPool, attend_to_all


class OpenedAttentionPoolLatent(OpenedPool, AttentionPoolLatent):
    """The pool of SigLIP and PE-Core, by this package's attention where that is faster."""

    plain = AttentionPoolLatent

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        is_simple = attn_mask is None and self.pos_embed is None
        if not is_simple or not is_faster_than_pytorch(x):
            return self.plain_forward(x, attn_mask)
        (query,) = split_heads(self.q(self.latent), self.num_heads, slice(0, 1))
        key, value = split_heads(self.kv(x), self.num_heads, slice(0, 2))
        pooled = attend_to_all(self.q_norm(query), self.k_norm(key), value)
        pooled = self.proj_drop(self.proj(pooled))
        if self.mlp is not None:
            pooled = pooled + self.mlp(self.norm(pooled))
        if self.pool == "token":
            return pooled[:, 0]
        return pooled.mean(1) if self.pool == "avg" else pooled
