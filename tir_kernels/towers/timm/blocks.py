"""Blocks of timm's VisionTransformer and Eva."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from timm.layers import GELU, GELUTanh, Mlp, QuickGELU
from timm.layers.attention import Attention, AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tir_kernels.towers.attention import OpenedLinear
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.mlp import OpenedMlp
from tir_kernels.towers.opening import Opened, put_on, require_own_forward, take_off
from tir_kernels.towers.protocol import AttentionCall, BlockAdapter, Linear
from tir_kernels.towers.timm.attention import (
    OpenedAttentionRope,
    OpenedEvaAttention,
    OpenedPlainAttention,
    OpenedTimmAttention,
)
from tir_kernels.towers.timm.pools import OpenedAttentionPoolLatent


def _norm_first(block: Any, hidden: Tensor) -> Tensor:
    return hidden if isinstance(block, EvaBlockPostNorm) else block.norm1(hidden)


def _after_attention(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    if isinstance(block, EvaBlockPostNorm):
        hidden = hidden + block.drop_path1(block.norm1(attended))
        return hidden + block.drop_path2(block.norm2(block.mlp(hidden)))
    if isinstance(block, EvaBlock):
        hidden = hidden + block.drop_path1(_scaled(attended, block.gamma_1))
        changed = _scaled(block.mlp(block.norm2(hidden)), block.gamma_2)
        return hidden + block.drop_path2(changed)
    hidden = hidden + block.drop_path1(block.ls1(attended))
    return hidden + block.drop_path2(block.ls2(block.mlp(block.norm2(hidden))))


def _scaled(change: Tensor, gain: Tensor | None) -> Tensor:
    return change if gain is None else gain * change


class _OpenedTimmBlock(Opened):
    def run(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        """The forward pass of tokens (B, L, D), with the options of timm's forward."""
        own: Any = self
        hidden, changes = self.enter(x)
        if not changes.modifiers:
            return self.plain_forward(hidden, **options)
        tokens = _norm_first(own, hidden)
        attended = own.attn(tokens, **options, changes=changes)
        return _after_attention(own, hidden, attended)


class _OpenedBlock(_OpenedTimmBlock, Block):
    """timm's usual block, with adapters on it."""

    plain = Block

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.run(x, {"attn_mask": attn_mask, "is_causal": is_causal})


class _OpenedRotaryBlock(_OpenedTimmBlock):
    # The positions of the pass under way, for adapters that look at the attention as they enter.
    rope_of_pass: Tensor | None

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        self.rope_of_pass = rope
        try:
            return self.run(x, {"rope": rope, "attn_mask": attn_mask, "is_causal": is_causal})
        finally:
            self.rope_of_pass = None


class _OpenedEvaBlock(_OpenedRotaryBlock, EvaBlock):
    """Eva's block, with adapters on it."""

    plain = EvaBlock


class _OpenedEvaBlockPostNorm(_OpenedRotaryBlock, EvaBlockPostNorm):
    """Eva's block that normalises what it adds, with adapters on it."""

    plain = EvaBlockPostNorm


class _OpenedMlp(OpenedMlp, Mlp):
    """timm's usual MLP."""

    plain = Mlp
    kinds: ClassVar[Mapping[type, str]] = {
        nn.GELU: "gelu",
        GELU: "gelu",
        GELUTanh: "gelu_tanh",
        QuickGELU: "quick_gelu",
    }

    def in_turn(self) -> list[nn.Module]:
        return [self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2]


class TimmBlock(BlockBase):
    """A block of timm's VisionTransformer."""

    opened: ClassVar[Mapping[type, type[Opened]]] = {
        Block: _OpenedBlock,
        Attention: OpenedPlainAttention,
        nn.Linear: OpenedLinear,
        Mlp: _OpenedMlp,
        OpenedAttentionPoolLatent.plain: OpenedAttentionPoolLatent,
    }
    blocks: ClassVar[tuple[type, ...]] = (Block,)
    attentions: ClassVar[tuple[type, ...]] = (Attention,)

    @property
    def linears(self) -> dict[str, Linear]:
        self.check_attention()
        attention = self.attention
        if attention.qkv is None:
            projections = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v")}
            return {
                name: Linear(each, (1, each.out_features, each.in_features))
                for name, each in projections.items()
            }
        qkv = attention.qkv
        shape = (3, qkv.out_features // 3, qkv.in_features)
        has_bias_apart = getattr(attention, "q_bias", None) is not None
        is_called = not has_bias_apart or attention.qkv_bias_separate
        return {name: Linear(qkv, shape, is_called) for name in ("q", "k", "v")}

    def norm_first(self, hidden: Tensor) -> Tensor:
        return _norm_first(self.module, hidden)

    def check_attention(self) -> None:
        attention = self.attention
        if isinstance(attention, OpenedTimmAttention):
            return
        projections = ("qkv", "q_proj", "k_proj", "v_proj")
        is_known = type(attention) in self.attentions and all(
            type(getattr(attention, name, None)) in (nn.Linear, OpenedLinear, type(None))
            for name in projections
        )
        if not is_known or attention.attn_drop.p > 0:
            names = " or ".join(each.__name__ for each in self.attentions)
            raise TypeError(
                f"model's blocks must use timm's {names} without dropout to take LoRA or placement "
                f"'attention'; got {type(attention).__name__}. Choose a standard architecture "
                "without dropout of attention, or placement 'tokens' without LoRA"
            )
        require_own_forward(attention)

    def put_low_rank(self, owner: Any, low_rank: nn.Module, handle: Any) -> None:
        super().put_low_rank(owner, low_rank, handle)
        put_on(self.attention, handle, self.opened)  # for first_tokens, and biases kept apart

    def take_low_rank(self, owner: Any, handle: Any) -> None:
        super().take_low_rank(owner, handle)
        take_off(self.attention, handle)

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.module(hidden) if mask is None else self.module(hidden, attn_mask=mask)

    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None:
        block = self.module
        # An adapter on the block needs all its tokens.
        if type(block) not in self.blocks or not isinstance(block.attn, OpenedTimmAttention):
            return None
        attended = self._attended_first(self.norm_first(hidden), count)
        return _after_attention(block, hidden[:, :count], attended)

    def _attended_first(self, tokens: Tensor, count: int) -> Tensor:
        return self.attention.first_tokens(tokens, count)


class EvaTowerBlock(TimmBlock):
    """A block of timm's Eva.

    Args:
        module, path: As of any block.
        rope: The number of tokens -> the rotary positions of this block, ``None`` without such.
    """

    opened: ClassVar[Mapping[type, type[Opened]]] = {
        EvaBlock: _OpenedEvaBlock,
        EvaBlockPostNorm: _OpenedEvaBlockPostNorm,
        EvaAttention: OpenedEvaAttention,
        AttentionRope: OpenedAttentionRope,
        nn.Linear: OpenedLinear,
        Mlp: _OpenedMlp,
        OpenedAttentionPoolLatent.plain: OpenedAttentionPoolLatent,
    }
    blocks: ClassVar[tuple[type, ...]] = (EvaBlock, EvaBlockPostNorm)
    attentions: ClassVar[tuple[type, ...]] = (EvaAttention, AttentionRope)

    def __init__(self, module: Any, path: str, rope: Callable[[int], Tensor | None]) -> None:
        super().__init__(module, path)
        self._rope = rope

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.module(hidden, rope=self._rope(hidden.shape[1]), attn_mask=mask)

    def attention_of(self, hidden: Tensor) -> AttentionCall:
        rope = getattr(self.module, "rope_of_pass", None)
        if rope is None:
            rope = self._rope(hidden.shape[1])
        return self.attention.call_of(self.norm_first(hidden), rope=rope)

    def take(self, adapter: BlockAdapter) -> None:
        super().take(adapter)
        if not isinstance(self.module, Opened):
            vars(self.module).pop("rope_of_pass", None)

    def _attended_first(self, tokens: Tensor, count: int) -> Tensor:
        return self.attention.first_tokens(tokens, count, self._rope(tokens.shape[1]))
