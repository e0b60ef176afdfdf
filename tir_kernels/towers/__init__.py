"""Vision and text towers, opened for adapters; no other room knows the libraries they are of."""

from tir_kernels.towers.find import FAMILIES, open_tower, text_tower, vision_tower
from tir_kernels.towers.frozen import (
    cast_blocks,
    frozen_mlps,
    frozen_norms,
    opened_attention,
    packable,
)
from tir_kernels.towers.products import packing
from tir_kernels.towers.run import ImageEncoder
from tir_kernels.towers.transformers_names import as_transformers_clip

__all__ = [
    "FAMILIES",
    "ImageEncoder",
    "as_transformers_clip",
    "cast_blocks",
    "frozen_mlps",
    "frozen_norms",
    "open_tower",
    "opened_attention",
    "packable",
    "packing",
    "text_tower",
    "vision_tower",
]
