"""The names of a model's blocks in transformers, which may express open_clip's as a CLIPModel."""

from __future__ import annotations

from typing import Any

import open_clip
from open_clip.transformer import LayerNorm, LayerNormFp32, ResidualAttentionBlock
from torch import nn

from tir_kernels.towers.find import text_tower, vision_tower

_PARTS = {"visual": "vision_model", "text": "text_model"}


def as_transformers_clip(model: nn.Module) -> dict[str, str]:
    """Path of each block's attention in the model of transformers that computes the same.

    That is a ``CLIPModel`` for open_clip's, and one of transformers' own itself.

    Returns:
        ``"{visual|text}.{layer}"`` -> path, such as ``vision_model.encoder.layers.0.self_attn``.

    Raises:
        TypeError: The model is built otherwise than a CLIPModel is.
    """
    if type(model).__module__.startswith("transformers."):
        towers: dict[str, Any] = {"visual": vision_tower(model), "text": text_tower(model)}
        return {
            f"{name}.{layer}": block.attention_path
            for name, tower in towers.items()
            for layer, block in enumerate(tower.blocks)
        }
    reason = _difference(model)
    if reason:
        raise TypeError(f"transformers' CLIPModel can't express this model: {reason}")
    depths = {"visual": len(vision_tower(model).blocks), "text": len(text_tower(model).blocks)}
    return {
        f"{name}.{layer}": f"{_PARTS[name]}.encoder.layers.{layer}.self_attn"
        for name, depth in depths.items()
        for layer in range(depth)
    }


def _difference(model: nn.Module) -> str:
    if not isinstance(model, (open_clip.CLIP, open_clip.CustomTextCLIP)):
        return f"it is a {type(model).__name__}"
    visual = model.visual
    text = model if isinstance(model, open_clip.CLIP) else model.text
    if not isinstance(visual, open_clip.transformer.VisionTransformer):
        return f"its image tower is a {type(visual).__name__}"
    if not isinstance(visual.ln_pre, (LayerNorm, LayerNormFp32, nn.LayerNorm)):
        return "its image tower has no LayerNorm in front of the blocks"
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.proj is None:
        return "its image tower pools otherwise than by the class token and a projection"
    blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
    if any(type(block) is not ResidualAttentionBlock for block in blocks):
        return "its blocks are of another kind"
    if any(not isinstance(block.ls_1, nn.Identity) for block in blocks):
        return "its blocks have layer scales"
    if getattr(text, "cls_emb", None) is not None or text.attn_mask is None:
        return "its text tower is not causal"
    if getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax")) != "argmax":
        return "its text tower pools otherwise than at the last token"
    return ""
