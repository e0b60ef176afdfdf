"""Attention pools in the open: queries of their own that attend to a tower's tokens."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.towers.attention import attend, is_faster_than_pytorch, join_heads, split_heads
from tir_kernels.towers.opening import Opened, is_untouched
from tir_kernels.towers.protocol import AttentionCall


class OpenedPool(Opened):
    """Mixed into the class of a pool, which takes no adapters but is open for its own sake."""


def attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(1, H, Lq, d) queries of all images, and twice (B, H, L, d) -> (B, Lq, H d)."""
    return join_heads(attend(AttentionCall(query.expand(len(key), -1, -1, -1), key, value)))


def is_served(module: nn.MultiheadAttention, tokens: Tensor) -> bool:
    """Whether :func:`pooled` computes what the module makes of tokens, and faster."""
    is_plain = type(module) is nn.MultiheadAttention and is_untouched(module)
    is_simple = module.bias_k is None and not module.add_zero_attn
    is_dropping = module.training and module.dropout > 0
    return is_plain and is_simple and not is_dropping and is_faster_than_pytorch(tokens)


def pooled(module: nn.MultiheadAttention, query: Tensor, tokens: Tensor) -> Tensor:
    """(Lq, D) queries of all images, projected once, and their tokens (B, L, K) -> (B, Lq, D)."""
    weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module._qkv_same_embed_dim:
        weights = module.in_proj_weight.chunk(3)
    biases: Any = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    rows = [
        split_heads(F.linear(each, weight, bias), module.num_heads, slice(0, 1))[0]
        for each, weight, bias in zip((query[None], tokens, tokens), weights, biases, strict=True)
    ]
    return module.out_proj(attend_to_all(*rows))
