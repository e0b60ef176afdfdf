"""Vision and text towers, opened for adapters; the only room that knows open_clip and timm."""

from tir_kernels.towers.find import FAMILIES, open_tower, text_tower, vision_tower
from tir_kernels.towers.frozen import cast_blocks, frozen_mlps
from tir_kernels.towers.run import ImageEncoder

__all__ = [
    "FAMILIES",
    "ImageEncoder",
    "cast_blocks",
    "frozen_mlps",
    "open_tower",
    "text_tower",
    "vision_tower",
]
