"""open_clip's own transformers: CLIP's image and text towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
    text_global_pool,
)
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.precision import autocast_dtype
from tir_kernels.towers.attention import (
    OpenedAttention,
    attend,
    attention_matrix,
    join_heads,
    project_parts,
    split_heads,
)
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.opening import Opened, refuse_attention_pool, require_own_forward
from tir_kernels.towers.protocol import Linear, Modifier
from tir_kernels.towers.run import EncodesText, features_of_patches, joint_space_of


class _OpenedMultiheadAttention(OpenedAttention, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` on one input, with room for LoRA and modifiers."""

    plain = nn.MultiheadAttention

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        packed = (self.in_proj_weight, self.in_proj_bias)
        return split_heads(project_parts(self, tokens, packed, parts), self.num_heads, parts)

    def output(self, attended: Tensor) -> Tensor:
        return self.out_proj(join_heads(attended))

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        modifiers: Sequence[Modifier] = (),
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As the plain module's, for one input and a mask that is added.

        Args:
            query, key, value: The same tokens, (B, L, D) or (L, B, D).
            need_weights: Also return the attention, (B, L, L).
            attn_mask: Added to the scores, (L, L) or (B H, L, L).
            average_attn_weights: Over the heads; else the attention is (B, H, L, L).
            modifiers: Of the pass under way, from the block.
            hidden: (B, L, D), what entered the block.

        Raises:
            ValueError: Several inputs, or a mask of booleans.
        """
        if key is not query or value is not query:
            raise ValueError(
                "this attention takes one input: query, key and value must be the same"
            )
        tokens = query if self.batch_first else query.transpose(0, 1)
        call = self.call_of(tokens, self._mask(attn_mask, len(tokens)), modifiers, hidden)
        output = self.output(attend(call))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        matrix = attention_matrix(call).to(output.dtype)
        return output, matrix.mean(1) if average_attn_weights else matrix

    def _mask(self, mask: Tensor | None, batch: int) -> Tensor | None:
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            raise ValueError("attn_mask must be added to the scores, so of floating point")
        return mask if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))


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
        changed, modifiers = self.enter(entered)
        hidden = changed if batch_first else changed.transpose(0, 1)
        if not modifiers:
            return self.plain_forward(hidden, k_x, v_x, attn_mask=attn_mask)
        tokens = self.ln_1(hidden)
        mask = None if attn_mask is None else attn_mask.to(tokens.dtype)
        attended, _ = self.attn(
            tokens,
            tokens,
            tokens,
            need_weights=False,
            attn_mask=mask,
            modifiers=modifiers,
            hidden=entered,
        )
        hidden = hidden + self.ls_1(attended)
        return hidden + self.ls_2(self.mlp(self.ln_2(hidden)))


class _OpenedCustomBlock(Opened, CustomResidualAttentionBlock):
    """open_clip's block with further norms and scales, whose attention is not opened."""

    plain = CustomResidualAttentionBlock

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        hidden, _ = self.enter(x)
        return self.plain_forward(hidden, attn_mask=attn_mask)


class OpenClipBlock(BlockBase):
    """A block of one of open_clip's transformers."""

    opened: ClassVar[Mapping[type, type[Opened]]] = {
        ResidualAttentionBlock: _OpenedBlock,
        CustomResidualAttentionBlock: _OpenedCustomBlock,
        nn.MultiheadAttention: _OpenedMultiheadAttention,
    }

    def __init__(self, module: Any, path: str, batch_first: bool) -> None:
        super().__init__(module, path)
        self._batch_first = batch_first

    @property
    def linears(self) -> dict[str, Linear]:
        self.check_attention()
        width = self.attention.embed_dim
        return {name: Linear(self.attention, (3, width, width)) for name in ("q", "k", "v")}

    def norm_first(self, hidden: Tensor) -> Tensor:
        return self.module.ln_1(hidden)

    def check_attention(self) -> None:
        attention = self.attention
        if isinstance(attention, _OpenedMultiheadAttention):
            return
        if not (
            type(attention) is nn.MultiheadAttention
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
        require_own_forward(attention)

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        if self._batch_first:
            return self.module(hidden, attn_mask=mask)
        return self.module(hidden.transpose(0, 1), attn_mask=mask).transpose(0, 1)

    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None:
        block = self.module
        if not (
            self._batch_first
            and type(block) is ResidualAttentionBlock  # an adapter needs all its tokens
            and isinstance(block.attn, _OpenedMultiheadAttention)
        ):
            return None
        attended = block.attn.first_tokens(block.ln_1(hidden), count)
        first = hidden[:, :count] + block.ls_1(attended)
        return first + block.ls_2(block.mlp(block.ln_2(first)))


def _blocks(transformer: Any, path: str) -> list[OpenClipBlock]:
    return [
        OpenClipBlock(block, f"{path}.resblocks.{layer}", transformer.batch_first)
        for layer, block in enumerate(transformer.resblocks)
    ]


class OpenClipVision:
    """open_clip's VisionTransformer."""

    num_prefix_tokens = 1  # _embeds puts the class token in front, whatever is pooled
    patch_features = features_of_patches

    def __init__(self, module: Any, path: str) -> None:
        self.module = module
        self._path = path

    @property
    def blocks(self) -> list[OpenClipBlock]:
        return _blocks(self.module.transformer, self._path)

    @property
    def reads(self) -> int | None:
        return 1 if self.module.pool_type == "tok" else None

    @property
    def joint_space(self) -> JointSpace:
        return joint_space_of(self.module.ln_post, self.module.proj)

    def embed(self, images: Tensor) -> Tensor:
        return self.module._embeds(images)

    def pool(self, hidden: Tensor) -> Tensor:
        pooled, _ = self.module._pool(hidden)
        return pooled if self.module.proj is None else pooled @ self.module.proj


class OpenClipText(EncodesText):
    """open_clip's text tower, whether it is part of the model (CLIP) or a module of its own."""

    def __init__(self, owner: Any, path: str, pool_type: str, eos_id: int | None) -> None:
        self._owner = owner
        self._path = path
        self._pool_type = pool_type
        self._eos_id = eos_id

    @property
    def blocks(self) -> list[OpenClipBlock]:
        return _blocks(self._owner.transformer, self._path)

    @property
    def is_causal(self) -> bool:
        return self._owner.attn_mask is not None

    def embed(self, token_ids: Tensor) -> Tensor:
        embedding = self._owner.token_embedding
        return embedding(token_ids.to(embedding.weight.device))

    def last_position(self, token_ids: Tensor) -> Tensor:
        """(C, T) token ids -> (C,) position whose output stands for the whole text.

        Raises:
            ValueError: The tower pools the text in a way that has no such position.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        one_position_each = positions.expand(len(token_ids), -1)[..., None]
        pooled = text_global_pool(one_position_each, token_ids, self._pool_type, self._eos_id)
        if pooled.dim() != 2:
            raise ValueError(f"model's text pooling {self._pool_type!r} keeps every token")
        return pooled[:, 0]

    def start(self, embeddings: Tensor) -> Tensor:
        dtype = embeddings.dtype
        if autocast_dtype(embeddings.device.type) is None:
            # That of the blocks; embeddings may have another.
            dtype = self._owner.transformer.get_cast_dtype()
        positions = self._owner.positional_embedding[: embeddings.shape[1]]
        return embeddings.to(dtype) + positions.to(dtype)

    def mask(self, length: int) -> Tensor | None:
        mask = self._owner.attn_mask
        return None if mask is None else mask[:length, :length]

    def pool(self, hidden: Tensor, last_position: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        pooled = self._owner.ln_final(hidden[rows, last_position])
        projection = self._owner.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection


class OpenClip:
    """The family of open_clip's native transformers."""

    images = "an open_clip model with open_clip's own VisionTransformer as image tower"
    texts = "an open_clip model with open_clip's own text transformer"

    @staticmethod
    def vision_tower(model: nn.Module) -> OpenClipVision | None:
        """The image tower of a model, or the model itself if it is one.

        Raises:
            ValueError: It pools by attention, so its patch tokens have no way into the joint space.
        """
        tower = getattr(model, "visual", model)
        if not isinstance(tower, VisionTransformer):
            return None
        refuse_attention_pool(tower)
        return OpenClipVision(tower, "transformer" if tower is model else "visual.transformer")

    @staticmethod
    def text_tower(model: Any) -> OpenClipText | None:
        """The text tower of a model.

        Raises:
            TypeError: It appends a class token to the text, or masks padding.
        """
        text = getattr(model, "text", None)
        if isinstance(text, TextTransformer):
            owner, path = text, "text.transformer"
            pool_type, eos_id = text.pool_type, text.eos_id
        elif text is None and hasattr(model, "token_embedding") and hasattr(model, "transformer"):
            owner, path = model, "transformer"
            pool_type, eos_id = model.text_pool_type, getattr(model, "text_eos_id", None)
        else:
            return None
        if getattr(owner, "cls_emb", None) is not None or getattr(owner, "use_pad_mask", False):
            raise TypeError(
                "model's text tower appends a class token or masks padding, which prompt learning "
                "does not support; choose a CLIP architecture such as ViT-B-16"
            )
        return OpenClipText(owner, path, pool_type, eos_id)
