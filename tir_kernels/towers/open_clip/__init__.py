"""open_clip's own transformers: CLIP's image and text towers."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from tir_kernels.towers.open_clip.blocks import require_runnable
from tir_kernels.towers.open_clip.text import OpenClipText
from tir_kernels.towers.open_clip.vision import OpenClipVision, vision_of


class OpenClip:
    """The family of open_clip's native transformers."""

    images = "an open_clip model with open_clip's own VisionTransformer as image tower"
    texts = "an open_clip model with open_clip's own text transformer"

    @staticmethod
    def vision_tower(model: nn.Module) -> OpenClipVision | None:
        """The image tower of a model, or the model itself if it is one.

        Raises:
            ValueError: It pools by an attention that isn't open_clip's, or its blocks' attention is
                one that open_clip can't compute.
        """
        tower = getattr(model, "visual", model)
        if not isinstance(tower, VisionTransformer):
            return None
        require_runnable(tower.transformer)
        return vision_of(tower, "transformer" if tower is model else "visual.transformer")

    @staticmethod
    def text_tower(model: Any) -> OpenClipText | None:
        """The text tower of a model.

        Raises:
            ValueError: Its attention is one that open_clip can't compute.
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
        require_runnable(owner.transformer)
        return OpenClipText(owner, path, pool_type, eos_id)
