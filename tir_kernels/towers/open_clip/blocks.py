"""Blocks of open_clip's own transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    LayerNorm,
    QuickGELU,
    ResidualAttentionBlock,
)
from torch import Tensor, nn

from tir_kernels.towers import norms
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.mlp import OpenedMlp
from tir_kernels.towers.norms import OpenedNorm
from tir_kernels.towers.open_clip.attention import (
    OpenedCustomAttention,
    OpenedMultiheadAttention,
)
from tir_kernels.towers.open_clip.pools import OpenedAttentionalPooler
from tir_kernels.towers.opening import (
    NO_CHANGES,
    Opened,
    has_own_forward,
    is_untouched,
    require_own_forward,
)
from tir_kernels.towers.protocol import Linear


class _OpenedBlock(Opened, ResidualAttentionBlock):
    """open_clip's usual block, with adapters on it."""

    plain = ResidualAttentionBlock

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        batch_first = self.attn.batch_first
        entered = q_x if batch_first else q_x.transpose(0, 1)
        changed, changes = self.enter(entered)
        hidden = changed if batch_first else changed.transpose(0, 1)
        if not changes.modifiers:
            return self.plain_forward(hidden, k_x, v_x, attn_mask=attn_mask)
        tokens = self.ln_1(hidden)
        mask = None if attn_mask is None else attn_mask.to(tokens.dtype)
        attended, _ = self.attn(
            tokens,
            tokens,
            tokens,
            need_weights=False,
            attn_mask=mask,
            changes=changes,
        )
        return _after_attention(self, hidden, attended)


class _OpenedCustomBlock(Opened, CustomResidualAttentionBlock):
    """open_clip's block with further norms and scales, with adapters on it."""

    plain = CustomResidualAttentionBlock

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        hidden, changes = self.enter(x)
        if not changes.modifiers:
            return self.plain_forward(hidden, attn_mask=attn_mask)
        attended = self.attn(self.ln_1(hidden), attn_mask, changes)
        return _after_attention(self, hidden, attended)


def _after_attention(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    if isinstance(block, CustomResidualAttentionBlock):
        attended = block.ln_attn(attended)
    hidden, tokens = _added_and_normed(block.ln_2, hidden, block.ls_1(attended))
    return hidden + block.ls_2(block.mlp(tokens))


def _added_and_normed(norm: Any, hidden: Tensor, change: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum, and it normalised."""
    if norms.are_fused(hidden) and norms.are_opened(norm):
        return norm.add(hidden, change)
    hidden = hidden if change is None else hidden + change
    return hidden, norm(hidden)


class _OpenedNorm(OpenedNorm, LayerNorm):
    """The usual norm of open_clip's blocks."""

    plain = LayerNorm


class _OpenedMlp(OpenedMlp, nn.Sequential):
    """The MLP of open_clip's blocks."""

    plain = nn.Sequential
    kinds: ClassVar[Mapping[type, str]] = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}

    def in_turn(self) -> list[nn.Module]:
        return list(self)


class OpenClipBlock(BlockBase):
    """A block of one of open_clip's transformers."""

    opened: ClassVar[Mapping[type, type[Opened]]] = {
        ResidualAttentionBlock: _OpenedBlock,
        CustomResidualAttentionBlock: _OpenedCustomBlock,
        nn.MultiheadAttention: OpenedMultiheadAttention,
        Attention: OpenedCustomAttention,
        nn.Sequential: _OpenedMlp,
        LayerNorm: _OpenedNorm,
        OpenedAttentionalPooler.plain: OpenedAttentionalPooler,
    }
    products: ClassVar[Mapping[type, tuple[str, ...]]] = {
        **BlockBase.products,
        Attention: ("in_proj_weight", "in_proj_bias"),
    }
    last_linears: ClassVar[tuple[str, ...]] = ("c_proj",)

    def __init__(self, module: Any, path: str, batch_first: bool) -> None:
        super().__init__(module, path)
        self.batch_first = batch_first

    @property
    def linears(self) -> dict[str, Linear]:
        self.check_attention()
        width = self.attention.in_proj_weight.shape[1]
        return {name: Linear(self.attention, (3, width, width)) for name in ("q", "k", "v")}

    def norm_first(self, hidden: Tensor) -> Tensor:
        return self.module.ln_1(hidden)

    def check_attention(self) -> None:
        attention = self.attention
        if isinstance(attention, (OpenedMultiheadAttention, OpenedCustomAttention)):
            return
        if type(attention) is Attention:
            is_known = attention.attn_drop.p == 0.0
        else:
            is_known = (
                type(attention) is nn.MultiheadAttention
                and attention._qkv_same_embed_dim
                and attention.bias_k is None
                and not attention.add_zero_attn
                and attention.dropout == 0.0
            )
        if not is_known:
            raise TypeError(
                "model's blocks must use nn.MultiheadAttention with packed projections, or "
                "open_clip's Attention, and no dropout to take LoRA or placement 'attention'; got "
                f"{type(attention).__name__}. Choose a standard CLIP architecture, or placement "
                "'tokens' without LoRA"
            )
        require_own_forward(attention)

    @property
    def _takes_known_masks(self) -> bool:
        """Whether what it is given for a mask reaches an opened attention as it is."""
        block = self.module
        is_known = isinstance(block, Opened) or type(block) in self.opened
        return is_known and has_own_forward(block) and isinstance(block.attn, Opened)

    def __call__(self, hidden: Tensor, mask: Any = None) -> Tensor:
        if norms.are_fused(hidden) and self._is_usual:
            return self._in_fewer_passes(hidden, mask)
        if isinstance(mask, KnownMask) and not self._takes_known_masks:
            mask = mask.tensor()
        if self.batch_first:
            return self.module(hidden, attn_mask=mask)
        return self.module(hidden.transpose(0, 1), attn_mask=mask).transpose(0, 1)

    @property
    def _is_usual(self) -> bool:
        """Whether the block is open_clip's usual one, with opened parts and no hooks on it."""
        block = self.module
        return (
            self.batch_first
            and type(block) in (ResidualAttentionBlock, _OpenedBlock)
            and is_untouched(block)
            and isinstance(block.attn, OpenedMultiheadAttention)
            and norms.are_opened(block.ln_1, block.ln_2)
        )

    def _in_fewer_passes(self, hidden: Tensor, mask: Any) -> Tensor:
        """The usual block's output, with its sums, norms and conversions fused."""
        block, changes = self.module, NO_CHANGES
        if isinstance(block, Opened):
            hidden, changes = block.enter(hidden)
        hidden, tokens = block.ln_1.add(hidden, None)
        mask = None if mask is None else mask.to(tokens.dtype)
        attended, _ = block.attn(
            tokens, tokens, tokens, need_weights=False, attn_mask=mask, changes=changes
        )
        return _after_attention(block, hidden, attended)

    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None:
        block = self.module
        if not (
            self.batch_first
            # An adapter on the block needs all its tokens.
            and type(block) in (ResidualAttentionBlock, CustomResidualAttentionBlock)
            and isinstance(block.attn, (OpenedMultiheadAttention, OpenedCustomAttention))
        ):
            return None
        hidden, tokens = _added_and_normed(block.ln_1, hidden, None)
        attended = block.attn.first_tokens(tokens, count)
        return _after_attention(block, hidden[:, :count], attended)


def require_runnable(transformer: Any) -> None:
    """Refuse blocks whose forward pass open_clip itself can't compute.

    Raises:
        ValueError: Their attention is a scaled cosine.
    """
    if any(getattr(block.attn, "scaled_cosine", False) for block in transformer.resblocks):
        raise ValueError(
            "model has scaled cosine attention (scaled_cosine_attn), whose forward pass fails in "
            "open_clip itself: torch.bmm takes no heads; choose qk_norm or the usual attention"
        )


def blocks_of(transformer: Any, path: str) -> list[OpenClipBlock]:
    return [
        OpenClipBlock(block, f"{path}.resblocks.{layer}", transformer.batch_first)
        for layer, block in enumerate(transformer.resblocks)
    ]
