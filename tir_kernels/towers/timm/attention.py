"""timm's self-attentions in the open: one packed projection or three, rotary positions, gates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention, AttentionRope, resolve_self_attn_mask
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from tir_kernels.towers.attention import (
    OpenedAttention,
    OpenedLinear,
    attend,
    is_faster_than_pytorch,
    join_heads,
    project_parts,
    split_heads,
)
from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.opening import NO_CHANGES, Changes
from tir_kernels.towers.products import through
from tir_kernels.towers.protocol import AttentionCall


class OpenedTimmAttention(OpenedAttention):
    """What timm's self-attentions have in common; the arithmetic is that of their own forward."""

    num_heads: int

    @property
    def _own(self) -> Any:
        return self

    @property
    def _separate_bias(self) -> Tensor | None:
        """(3 K,) bias of a packed projection that is kept apart from its weight, as EVA's is."""
        own = self._own
        if getattr(own, "q_bias", None) is None:
            return None
        return torch.cat([own.q_bias, own.k_bias, own.v_bias])

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """(B, L, D) -> (B, H, L, d) each of some of query, key and value, without positions."""
        own = self._own
        if own.qkv is None:
            projections = (own.q_proj, own.k_proj, own.v_proj)[parts]
            heads = tuple(
                projection(tokens).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
                for projection in projections
            )
        else:
            bias = self._separate_bias
            if bias is None and parts == slice(0, 3):
                projected = own.qkv(tokens)
            else:
                packed = (own.qkv.weight, own.qkv.bias if bias is None else bias)
                projected = project_parts(own.qkv, tokens, packed, parts)
            heads = split_heads(projected, own.num_heads, parts)
        norms: list[Any] = [own.q_norm, own.k_norm, nn.Identity()][parts]
        normed = (norm(part) for norm, part in zip(norms, heads, strict=True))
        return tuple(self._for_all_heads(part) for part in normed)

    def _for_all_heads(self, part: Tensor) -> Tensor:
        """Keys or values that several heads share, once for each of them."""
        shared_by = self.num_heads // part.shape[1]
        return part.repeat_interleave(shared_by, dim=1) if shared_by > 1 else part

    def _rotated(self, part: Tensor, rope: Tensor | None, value: Tensor) -> Tensor:
        """Queries or keys of the first tokens, turned by their positions, which prefixes lack."""
        own = self._own
        if rope is None or part.shape[2] <= own.num_prefix_tokens:
            return part
        prefix, patches = part.tensor_split([own.num_prefix_tokens], dim=2)
        positions = rope[..., : patches.shape[2], :]
        turned = apply_rot_embed_cat(patches, positions, half=own.rotate_half)
        return torch.cat([prefix, turned], dim=2).type_as(value)

    def call_of(
        self,
        tokens: Tensor,
        mask: Tensor | KnownMask | None = None,
        changes: Changes = NO_CHANGES,
        rope: Tensor | None = None,
    ) -> AttentionCall:
        """As of any attention, with the rotary positions (..., N, 2 d) of N patches."""
        call = super().call_of(tokens, mask)
        query, key = (self._rotated(part, rope, call.value) for part in (call.query, call.key))
        return changes.of(call._replace(query=query, key=key))

    def first_tokens(self, tokens: Tensor, count: int, rope: Tensor | None = None) -> Tensor:
        (query,) = self.project(tokens[:, :count], slice(0, 1))
        key, value = self.project(tokens, slice(1, 3))
        query, key = (self._rotated(part, rope, value) for part in (query, key))
        call = AttentionCall(query, key, value, backend=self._backend)
        return self.output(attend(call), tokens[:, :count])

    def output(self, attended: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, H, L, d) -> (B, L, D); ``tokens`` are what was projected, which a gate reads."""
        own = self._own
        joined = own.norm(join_heads(attended))
        if own.gate is not None:
            joined = joined * own.gate(tokens).sigmoid()
        return own.proj_drop(through(own.proj, joined))

    def run(
        self,
        x: Tensor,
        options: dict[str, Any],
        changes: Changes,
    ) -> Tensor:
        """The forward pass.

        Args:
            x: (B, L, D), normalised as the block does it.
            options: ``attn_mask``, ``is_causal`` and perhaps ``rope``, as timm takes them.
            changes: Of the pass under way, from the block.
        """
        # EVA's packed projection with its bias apart doesn't go through the module of the weight.
        has_hidden_lora = (
            isinstance(self._own.qkv, OpenedLinear) and self._separate_bias is not None
        )
        is_faster_opened = options["attn_mask"] is None and is_faster_than_pytorch(x)
        if not (changes.modifiers or has_hidden_lora or is_faster_opened):
            return self.plain_forward(x, **options)
        mask = _mask_of(x, options["attn_mask"], options["is_causal"])
        call = self.call_of(x, mask, changes, options.get("rope"))
        return self.output(attend(call), x)


def _mask_of(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | KnownMask | None:
    """What timm's options hide from tokens (B, L, D)."""
    resolved = partial(resolve_self_attn_mask, x.shape[1], x, attn_mask, is_causal=is_causal)
    return KnownMask(resolved, True) if is_causal and attn_mask is None else resolved()


class OpenedPlainAttention(OpenedTimmAttention, Attention):
    """The attention of timm's VisionTransformer."""

    plain = Attention

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        changes: Changes = NO_CHANGES,
    ) -> Tensor:
        options = {"attn_mask": attn_mask, "is_causal": is_causal}
        return self.run(x, options, changes)


class _OpenedRotaryAttention(OpenedTimmAttention):
    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        changes: Changes = NO_CHANGES,
    ) -> Tensor:
        options = {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal}
        return self.run(x, options, changes)


class OpenedEvaAttention(_OpenedRotaryAttention, EvaAttention):
    """The attention of timm's Eva, with biases of query and value apart from the weight."""

    plain = EvaAttention


class OpenedAttentionRope(_OpenedRotaryAttention, AttentionRope):
    """The attention of timm's Eva that has its biases in the projections."""

    plain = AttentionRope
