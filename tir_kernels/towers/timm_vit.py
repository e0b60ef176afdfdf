"""timm's VisionTransformer, with registers or without: an image tower that knows no texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers.attention import (
    OpenedAttention,
    OpenedLinear,
    attend,
    join_heads,
    project_parts,
    split_heads,
)
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.opening import (
    Opened,
    put_on,
    refuse_attention_pool,
    require_own_forward,
    take_off,
)
from tir_kernels.towers.protocol import Linear, Modifier
from tir_kernels.towers.run import features_of_patches, joint_space_of, unchanged_tokens


class _OpenedAttention(OpenedAttention, Attention):
    """timm's self-attention, with room for modifiers."""

    plain = Attention

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        if parts == slice(0, 3):
            projected = self.qkv(tokens)
        else:
            projected = project_parts(self.qkv, tokens, (self.qkv.weight, self.qkv.bias), parts)
        norms: list[Any] = [self.q_norm, self.k_norm, nn.Identity()][parts]
        heads = split_heads(projected, self.num_heads, parts)
        return tuple(norm(part) for norm, part in zip(norms, heads, strict=True))

    def output(self, attended: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self.norm(join_heads(attended))))

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        modifiers: Sequence[Modifier] = (),
        hidden: Tensor | None = None,
    ) -> Tensor:
        if not modifiers:
            return self.plain_forward(x, attn_mask=attn_mask, is_causal=is_causal)
        if is_causal:
            raise ValueError("is_causal cannot be combined with re-weighted attention")
        return self.output(attend(self.call_of(x, attn_mask, modifiers, hidden)))


class _OpenedBlock(Opened, Block):
    """timm's usual block, with adapters on it."""

    plain = Block

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        hidden, modifiers = self.enter(x)
        options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal}
        if not modifiers:
            return self.plain_forward(hidden, **options)
        attended = self.attn(self.norm1(hidden), **options, modifiers=modifiers, hidden=x)
        return _after_attention(self, hidden, attended)


def _after_attention(block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + block.drop_path1(block.ls1(attended))
    return hidden + block.drop_path2(block.ls2(block.mlp(block.norm2(hidden))))


class TimmBlock(BlockBase):
    """A block of timm's VisionTransformer."""

    opened: ClassVar[Mapping[type, type[Opened]]] = {
        Block: _OpenedBlock,
        Attention: _OpenedAttention,
        nn.Linear: OpenedLinear,
    }

    @property
    def linears(self) -> dict[str, Linear]:
        self.check_attention()
        qkv = self.attention.qkv
        shape = (3, qkv.out_features // 3, qkv.in_features)
        return {name: Linear(qkv, shape) for name in ("q", "k", "v")}

    def norm_first(self, hidden: Tensor) -> Tensor:
        return self.module.norm1(hidden)

    def check_attention(self) -> None:
        attention = self.attention
        if isinstance(attention, _OpenedAttention):
            return
        is_usual = type(attention) is Attention and type(attention.qkv) in (
            nn.Linear,
            OpenedLinear,
        )
        if not is_usual or attention.gate is not None or attention.attn_drop.p > 0:
            raise TypeError(
                "model's blocks must use timm's Attention without gate and dropout to take LoRA or "
                f"placement 'attention'; got {type(attention).__name__}. Choose a standard "
                "architecture, or placement 'tokens' without LoRA"
            )
        require_own_forward(attention)

    def put_low_rank(self, owner: Any, low_rank: nn.Module, handle: Any) -> None:
        super().put_low_rank(owner, low_rank, handle)
        put_on(self.attention, handle, self.opened)  # for first_tokens

    def take_low_rank(self, owner: Any, handle: Any) -> None:
        super().take_low_rank(owner, handle)
        take_off(self.attention, handle)

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.module(hidden) if mask is None else self.module(hidden, attn_mask=mask)

    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None:
        block = self.module
        # An adapter on the block needs all its tokens.
        if type(block) is not Block or not isinstance(block.attn, _OpenedAttention):
            return None
        attended = block.attn.first_tokens(block.norm1(hidden), count)
        return _after_attention(block, hidden[:, :count], attended)


class TimmVision:
    """timm's VisionTransformer; its features are those before the classifier."""

    compared_tokens = unchanged_tokens
    patch_features = features_of_patches

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def num_prefix_tokens(self) -> int:
        return self.module.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.module.cls_token is not None

    @property
    def reads(self) -> int | None:
        return 1 if self.module.global_pool == "token" else None

    @property
    def blocks(self) -> list[TimmBlock]:
        return [
            TimmBlock(block, f"blocks.{layer}") for layer, block in enumerate(self.module.blocks)
        ]

    @property
    def joint_space(self) -> JointSpace:
        # One of the two is a LayerNorm: fc_norm where the tokens are averaged first.
        norm = self.module.norm
        return joint_space_of(self.module.fc_norm if isinstance(norm, nn.Identity) else norm, None)

    def embed(self, images: Tensor) -> Tensor:
        tower = self.module
        return tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(images))))

    def pool(self, hidden: Tensor) -> Tensor:
        return self.module.forward_head(self.module.norm(hidden), pre_logits=True)


class TimmVit:
    """The family of timm's vision transformers."""

    images = "a timm VisionTransformer"
    texts = ""

    @staticmethod
    def vision_tower(model: nn.Module) -> TimmVision | None:
        """The opened tower, if the model is one.

        Raises:
            ValueError: It pools by attention.
        """
        if not isinstance(model, VisionTransformer):
            return None
        refuse_attention_pool(model)
        return TimmVision(model)

    @staticmethod
    def text_tower(model: nn.Module) -> None:
        """Nothing: these towers know images alone."""
