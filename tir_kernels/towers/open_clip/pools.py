"""open_clip's attention pool in the open."""

from __future__ import annotations

from open_clip.transformer import AttentionalPooler
from torch import Tensor

from tir_kernels.towers.pools import OpenedPool, is_served, pooled


class OpenedAttentionalPooler(OpenedPool, AttentionalPooler):
    """CoCa's pool, or one of its two, by this package's attention where that is faster."""

    plain = AttentionalPooler

    def forward(self, x: Tensor) -> Tensor:
        if not is_served(self.attn, x):
            return self.plain_forward(x)
        return pooled(self.attn, self.ln_q(self.query), self.ln_k(x))
