"""Self-attention that LoRA and re-weighting can reach into, in place of nn.MultiheadAttention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import weighted_attention

if TYPE_CHECKING:
    from tir_kernels.adapters.low_rank import LowRank


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` on one input, with room for LoRA and for key weights.

    It shares the parameters of the module it stands in for, under the same names, so that a
    state_dict keeps its keys.

    Args:
        attention: The module to stand in for: packed query, key and value projections of one width,
            no attention dropout.

    Raises:
        TypeError: Another kind of attention module.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        if not (
            isinstance(attention, nn.MultiheadAttention)
            and attention._qkv_same_embed_dim
            and attention.bias_k is None
            and not attention.add_zero_attn
            and attention.dropout == 0.0
        ):
            raise TypeError(
                "model's blocks must use nn.MultiheadAttention with packed projections and no "
                f"dropout to take LoRA or placement 'attention'; got {type(attention).__name__}. "
                "Choose a standard CLIP architecture, or placement 'tokens' without LoRA"
            )
        self.in_proj_weight = attention.in_proj_weight
        self.in_proj_bias = attention.in_proj_bias
        self.out_proj = attention.out_proj
        self.num_heads = attention.num_heads
        self.batch_first = attention.batch_first
        self.low_rank: LowRank | None = None
        self.is_reweighted = False
        self.key_weights: Tensor | None = None  # (B, L), of the forward pass under way
        self.backend = "auto"
        self._original: Any = [attention]  # in a list, so that it is no sub-module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if key is not query or value is not query:
            raise ValueError(
                "this attention takes one input: query, key and value must be the same"
            )
        tokens = query if self.batch_first else query.transpose(0, 1)
        batch, length, width = tokens.shape
        projected = self._project(tokens)
        heads = (self.num_heads, width // self.num_heads)
        q, k, v = projected.view(batch, length, 3, *heads).permute(2, 0, 3, 1, 4)
        if self.key_weights is not None:
            if attn_mask is not None:
                raise ValueError("key weights cannot be combined with an attention mask")
            attended = weighted_attention(q, k, v, self.key_weights, backend=self.backend)
        else:
            attended = _unweighted_attention(q, k, v, attn_mask)
        output = self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
        return (output if self.batch_first else output.transpose(0, 1)), None

    def _project(self, tokens: Tensor, first: int = 0, count: int = 3) -> Tensor:
        """(B, L, D) -> (B, L, count D) of query, key and value, from the ``first`` on."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if self.low_rank is not None:
            return self.low_rank.project(tokens, weight, bias, first, count)
        width = tokens.shape[-1]
        chosen = slice(first * width, (first + count) * width)
        return F.linear(tokens, weight[chosen], None if bias is None else bias[chosen])

    def first_token(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, 1, D): as ``forward`` for the first token, which attends to all."""
        batch, length, width = tokens.shape
        heads = (self.num_heads, width // self.num_heads)
        q = self._project(tokens[:, :1], 0, 1).view(batch, 1, *heads).transpose(1, 2)
        k, v = self._project(tokens, 1, 2).view(batch, length, 2, *heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).reshape(batch, 1, width))


def _unweighted_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None and q.device.type == "cpu" and q.dtype != torch.float64:
        # Faster than PyTorch's own on a CPU, by far in 16 bits.
        return weighted_attention(q, k, v, q.new_ones(q.shape[0], q.shape[2], dtype=torch.float32))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask.to(q.dtype)
    )


def open_attention(block: Any) -> SelfAttention:
    """The block's :class:`SelfAttention`, put in place of the original if it is not yet there."""
    if not isinstance(block.attn, SelfAttention):
        replacement = SelfAttention(block.attn)
        replacement.train(block.attn.training)
        block.attn = replacement
    return block.attn


def close_attention(block: Any) -> None:
    """Put the original attention back, unless LoRA or re-weighting still needs the stand-in."""
    attention = block.attn
    if attention.low_rank is None and not attention.is_reweighted:
        (original,) = attention._original
        original.train(attention.training)
        block.attn = original
