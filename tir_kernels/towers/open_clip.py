"""The parts of an open_clip model that re-weighting, LoRA and prompt learning work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.precision import autocast_dtype
from tir_kernels.scalars import whole_number


def vision_tower(model: nn.Module) -> VisionTransformer:
    """The image tower of a model, or the model itself if it is one.

    Raises:
        TypeError: The tower is not open_clip's own VisionTransformer.
        ValueError: It pools by attention, so its patch tokens have no way into the joint space.
    """
    tower = getattr(model, "visual", model)
    if not isinstance(tower, VisionTransformer):
        raise TypeError(
            "model must be an open_clip model with open_clip's own VisionTransformer as image "
            f"tower; its tower is {type(tower).__name__}. Choose an architecture such as ViT-B-16"
        )
    if getattr(tower, "attn_pool", None) is not None:
        raise ValueError(
            "model pools its image tokens by attention, so single patch tokens cannot be compared "
            "with class embeddings; choose an architecture without attentional pooling"
        )
    return tower


def joint_space(tower: VisionTransformer) -> JointSpace:
    """The tower's final norm and projection, which map patch tokens to the joint space."""
    norm = tower.ln_post
    if isinstance(norm, nn.LayerNorm):
        return JointSpace(norm.weight, norm.bias, norm.eps, tower.proj)
    return JointSpace(norm_eps=None, proj=tower.proj)


@dataclass(frozen=True)
class TextTower:
    """open_clip's text tower, whether it is part of the model (CLIP) or a module of its own."""

    prefix: str  # path of its transformer in the model, for parameter names
    transformer: Any
    token_embedding: nn.Embedding
    positional_embedding: Tensor
    final_norm: nn.Module
    projection: nn.Module | Tensor | None
    attention_mask: Tensor | None
    pool_type: str
    eos_id: int | None

    @property
    def is_causal(self) -> bool:
        return self.attention_mask is not None

    def last_position(self, token_ids: Tensor) -> Tensor:
        """(C, T) token ids -> (C,) position whose output stands for the whole text.

        Raises:
            ValueError: The tower pools the text in a way that has no such position.
        """
        num_positions = token_ids.shape[1]
        positions = torch.arange(num_positions, device=token_ids.device)
        one_position_each = positions.expand(len(token_ids), -1)[..., None]
        pooled = text_global_pool(one_position_each, token_ids, self.pool_type, self.eos_id)
        if pooled.dim() != 2:
            raise ValueError(f"model's text pooling {self.pool_type!r} keeps every token")
        return pooled[:, 0]

    def embed(self, hidden: Tensor, last_position: Tensor) -> Tensor:
        """(C, T, W) output of a block -> (C, E) class embeddings in the joint space."""
        rows = torch.arange(len(hidden), device=hidden.device)
        pooled = self.final_norm(hidden[rows, last_position])
        if self.projection is None:
            return pooled
        if isinstance(self.projection, nn.Module):
            return self.projection(pooled)
        return pooled @ self.projection

    def encode(
        self, embeddings: Tensor, last_position: Tensor, layer: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the tower on token embeddings.

        Args:
            embeddings: (C, T, W), without positional embeddings, T at most the context length.
            last_position: (C,) position that stands for the text.
            layer: Also embed the output of this block; ``None``: of the last one.

        Returns:
            (C, E) class embeddings of the last block and (C, E) of block ``layer``.

        Raises:
            ValueError: There is no block ``layer``.
        """
        blocks = self.transformer.resblocks
        if layer is not None:
            layer = whole_number("layer", layer, "a whole number or None")
            if not 0 <= layer < len(blocks):
                raise ValueError(f"layer must lie between 0 and {len(blocks) - 1}; got {layer}")
        length = embeddings.shape[1]
        mask = None if self.attention_mask is None else self.attention_mask[:length, :length]
        dtype = embeddings.dtype
        if autocast_dtype(embeddings.device.type) is None:
            dtype = self.transformer.get_cast_dtype()  # of the blocks; embeddings may have another
        hidden = embeddings.to(dtype) + self.positional_embedding[:length].to(dtype)
        intermediate = None
        for index, block in enumerate(blocks):
            if self.transformer.batch_first:
                hidden = block(hidden, attn_mask=mask)
            else:
                hidden = block(hidden.transpose(0, 1), attn_mask=mask).transpose(0, 1)
            if index == layer:
                intermediate = hidden
        final = self.embed(hidden, last_position)
        return final, final if intermediate is None else self.embed(intermediate, last_position)


def text_tower(model: Any) -> TextTower:
    """The text tower of an open_clip model.

    Raises:
        TypeError: It is not open_clip's own, or appends a class token to the text.
    """
    text = getattr(model, "text", None)
    if isinstance(text, TextTransformer):
        owner, prefix = text, "text.transformer"
        pool_type, eos_id = text.pool_type, text.eos_id
    elif text is None and hasattr(model, "token_embedding") and hasattr(model, "transformer"):
        owner, prefix = model, "transformer"
        pool_type, eos_id = model.text_pool_type, getattr(model, "text_eos_id", None)
    else:
        raise TypeError(
            "model must be an open_clip model with open_clip's own text transformer; got "
            f"{type(model).__name__} with text tower {type(text).__name__}"
        )
    if getattr(owner, "cls_emb", None) is not None or getattr(owner, "use_pad_mask", False):
        raise TypeError(
            "model's text tower appends a class token or masks padding, which prompt learning does "
            "not support; choose a CLIP architecture such as ViT-B-16"
        )
    return TextTower(
        prefix=prefix,
        transformer=owner.transformer,
        token_embedding=owner.token_embedding,
        positional_embedding=owner.positional_embedding,
        final_norm=owner.ln_final,
        projection=owner.text_projection,
        attention_mask=owner.attn_mask,
        pool_type=pool_type,
        eos_id=eos_id,
    )
