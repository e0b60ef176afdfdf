"""open_clip's self-attention in the open."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import Attention
from torch import Tensor, nn

from tir_kernels.towers.attention import (
    OpenedAttention,
    attend,
    attention_matrix,
    join_heads,
    project_parts,
    split_heads,
)
from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.opening import NO_CHANGES, Changes
from tir_kernels.towers.products import through


class OpenedMultiheadAttention(OpenedAttention, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` on one input, with room for LoRA and modifiers."""

    plain = nn.MultiheadAttention

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        packed = (self.in_proj_weight, self.in_proj_bias)
        return split_heads(project_parts(self, tokens, packed, parts), self.num_heads, parts)

    def output(self, attended: Tensor) -> Tensor:
        return through(self.out_proj, join_heads(attended))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        need_weights: bool = True,
        attn_mask: Tensor | KnownMask | None = None,
        average_attn_weights: bool = True,
        changes: Changes = NO_CHANGES,
    ) -> tuple[Tensor, Tensor | None]:
        """As the plain module's, for one input and a mask that is added.

        Args:
            query, key, value: The same tokens, (B, L, D) or (L, B, D).
            need_weights: Also return the attention, (B, L, L).
            attn_mask: Added to the scores, (L, L) or (B H, L, L), or known to a text tower.
            average_attn_weights: Over the heads; else the attention is (B, H, L, L).
            changes: Of the pass under way, from the block.

        Raises:
            ValueError: Several inputs, or a mask of booleans.
        """
        if key is not query or value is not query:
            raise ValueError(
                "this attention takes one input: query, key and value must be the same"
            )
        tokens = query if self.batch_first else query.transpose(0, 1)
        call = self.call_of(tokens, _added_mask(attn_mask, len(tokens), self.num_heads), changes)
        output = self.output(attend(call))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        matrix = attention_matrix(call).to(output.dtype)
        return output, matrix.mean(1) if average_attn_weights else matrix


class OpenedCustomAttention(OpenedAttention, Attention):
    """open_clip's attention with norms of queries and keys, scales of heads or an inner norm."""

    plain = Attention

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        packed = (self.in_proj_weight, self.in_proj_bias)
        heads = split_heads(project_parts(self, tokens, packed, parts), self.num_heads, parts)
        norms: list[Any] = [self.ln_q, self.ln_k, nn.Identity()][parts]
        return tuple(norm(part) for norm, part in zip(norms, heads, strict=True))

    def output(self, attended: Tensor) -> Tensor:
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(through(self.out_proj, self.ln_inner(join_heads(attended))))

    def forward(
        self, x: Tensor, attn_mask: Tensor | KnownMask | None = None, changes: Changes = NO_CHANGES
    ) -> Tensor:
        mask = _added_mask(attn_mask, len(x), self.num_heads)
        return self.output(attend(self.call_of(x, mask, changes)))


def _added_mask(
    mask: Tensor | KnownMask | None, batch: int, num_heads: int
) -> Tensor | KnownMask | None:
    """A mask as open_clip gives it, (L, L) or (B H, L, L), for an ``AttentionCall``."""
    if mask is None or isinstance(mask, KnownMask):
        return mask
    if mask.dtype == torch.bool:
        raise ValueError("attn_mask must be added to the scores, so of floating point")
    return mask.unflatten(0, (batch, num_heads)) if mask.dim() == 3 else mask
