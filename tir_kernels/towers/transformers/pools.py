"""The attention pools of transformers' SigLIP and SigLIP 2 in the open."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.models.siglip2.modeling_siglip2 import Siglip2MultiheadAttentionPoolingHead

from tir_kernels.towers.pools import OpenedPool, is_served, pooled


class _Head(OpenedPool):
    """The library's pool, by this package's attention where that is faster."""

    probe: Tensor
    attention: Any
    layernorm: Any
    mlp: Any

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:  # of SigLIP 2, where it hides padded patches
            return self.plain_forward(hidden_state, attention_mask)
        if not is_served(self.attention, hidden_state):
            return self.plain_forward(hidden_state)
        found = pooled(self.attention, self.probe[0], hidden_state)
        return (found + self.mlp(self.layernorm(found)))[:, 0]


class OpenedSiglipHead(_Head, SiglipMultiheadAttentionPoolingHead):
    plain = SiglipMultiheadAttentionPoolingHead


class OpenedSiglip2Head(_Head, Siglip2MultiheadAttentionPoolingHead):
    plain = Siglip2MultiheadAttentionPoolingHead
