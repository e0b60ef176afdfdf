"""Hugging Face transformers' CLIPModel, SiglipModel and Siglip2Model, and their towers alone.

Whoever has such a model has imported transformers: nothing of it is imported here before.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from tir_kernels.towers.transformers.text import TransformersText
    from tir_kernels.towers.transformers.vision import TransformersVision

_OLDEST = 5  # before, encoder layers took and gave other things

# Library's module -> the classes in it that hold an image tower, and those that hold a text tower.
# The last of each are what a model's towers are up to 5.5; then they are those in front of them.
_IMAGES = {
    "clip": (
        *("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
        "CLIPVisionTransformer",
    ),
    "siglip": ("SiglipModel", "SiglipVisionModel", "SiglipVisionTransformer"),
    "siglip2": ("Siglip2Model", "Siglip2VisionModel", "Siglip2VisionTransformer"),
}
_TEXTS = {
    "clip": ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTextTransformer"),
    "siglip": ("SiglipModel", "SiglipTextModel", "SiglipTextTransformer"),
    "siglip2": ("Siglip2Model", "Siglip2TextModel", "Siglip2TextTransformer"),
}


class Transformers:
    """The family of transformers' CLIP and SigLIP."""

    images = "a CLIPModel, SiglipModel or Siglip2Model of transformers, or its image tower"
    texts = "a CLIPModel, SiglipModel or Siglip2Model of transformers"

    @staticmethod
    def vision_tower(model: Any) -> TransformersVision | None:
        """The image tower of a model, or the model itself if it is one.

        Raises:
            ValueError: It has no pooling, so there are no image features; or the library is too
                old.
        """
        kind = _kind(model, _IMAGES)
        if kind is None:
            return None
        from tir_kernels.towers.transformers.vision import vision_of

        return vision_of(model, kind)

    @staticmethod
    def text_tower(model: Any) -> TransformersText | None:
        """The text tower of a model, or the model itself if it is one.

        Raises:
            ValueError: The library is too old.
        """
        kind = _kind(model, _TEXTS)
        if kind is None:
            return None
        from tir_kernels.towers.transformers.text import text_of

        return text_of(model, kind)


def _kind(model: nn.Module, classes: dict[str, tuple[str, ...]]) -> str | None:
    """The library's module that a model, or a class it is derived from, is of.

    Raises:
        ValueError: The library is too old.
    """
    for kind, names in classes.items():
        module = sys.modules.get(f"transformers.models.{kind}.modeling_{kind}")
        known = tuple(getattr(module, name, ()) for name in names) if module is not None else ()
        if isinstance(model, known):
            version = sys.modules["transformers"].__version__
            if int(version.split(".")[0]) < _OLDEST:
                raise ValueError(
                    f"model is of transformers {version}, whose towers can't be opened; "
                    "pip install 'transformers>=5.2,<6'"
                )
            return kind
    return None
