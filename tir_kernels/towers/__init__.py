"""Vision and text towers, opened for adapters; the only room that knows open_clip."""

from tir_kernels.towers.frozen import cast_blocks, frozen_mlps
from tir_kernels.towers.run import ImageEncoder

__all__ = ["ImageEncoder", "cast_blocks", "frozen_mlps"]
