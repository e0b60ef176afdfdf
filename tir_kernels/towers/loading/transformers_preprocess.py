"""The preprocessing of a transformers image processor, in the two halves of ``Preprocess``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
import transformers
from PIL import Image
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.text import setting
from tir_kernels.towers.loading.preprocess import Preprocess

_MODEL = setting("model")

# Images of two shapes, to see that the processor gives both the model's.
_TRIALS = ((40, 30), (30, 70))


class TransformersPreprocess(Preprocess):
    """An image processor of transformers.

    Args:
        processor: The library's.
        side: H and W of the model's images.
        folder: Where it is from, for errors.

    Raises:
        FewShotError: It gives images of other sizes, or scales them as no model here does.
    """

    def __init__(self, processor: Any, side: int, folder: Path) -> None:
        self.processor, self._folder = processor, folder
        settings = processor.to_dict()
        factor = settings.get("rescale_factor", 1 / 255)
        if not settings.get("do_rescale", True) or abs(255 * factor - 1) > 1e-6:
            raise FewShotError(
                f"{_MODEL}: the image processor of {folder} must rescale pixels by 1/255; set "
                "do_rescale and rescale_factor so in its configuration"
            )
        normalises = settings.get("do_normalize", True)
        self._mean = settings["image_mean"] if normalises else [0.0] * 3
        self._std = settings["image_std"] if normalises else [1.0] * 3
        self.shape = (3, side, side)
        versions = [PIL.__version__, torchvision.__version__, transformers.__version__]
        self.version = json.dumps(["transformers", versions, settings], sort_keys=True, default=str)
        try:
            shapes = {tuple(self.to_pixels(Image.new("RGB", size)).shape) for size in _TRIALS}
        except Exception as error:
            raise FewShotError(
                f"{_MODEL}: the image processor of {folder} can't be used: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        if shapes != {self.shape}:
            raise FewShotError(
                f"{_MODEL}: the image processor of {folder} gives images of {sorted(shapes)}, but "
                f"the model takes {self.shape}; set its size and crop to {side} pixels"
            )

    def with_resize(
        self, is_squashed: bool, interpolation: str | None = None
    ) -> TransformersPreprocess:
        """The same processor with other settings, which not every one heeds.

        Raises:
            FewShotError: It then gives images of other sizes.
        """
        _, height, width = self.shape
        whole = {"height": height, "width": width}
        changes: dict[str, Any] = {
            "do_resize": True,
            "do_center_crop": not is_squashed,
            "size": whole if is_squashed else {"shortest_edge": height},
            "crop_size": whole,
        }
        if interpolation is not None:
            changes["resample"] = _resampling(interpolation)
        processor = type(self.processor).from_dict({**self.processor.to_dict(), **changes})
        return TransformersPreprocess(processor, height, self._folder)

    def _resized(self, image: Image.Image) -> Tensor:
        output = self.processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        return output["pixel_values"][0].to(torch.uint8)


class GridPreprocess(TransformersPreprocess):
    """SigLIP 2's processor, which gives an image a grid of its own, on images that share one.

    That grid is the largest square that ``max_num_patches`` allows: images that are not square are
    squashed, and the processor does the rest.

    Args:
        processor: A ``Siglip2ImageProcessor``.
        folder: Where it is from, for errors.

    Raises:
        FewShotError: As for any processor.
    """

    def __init__(self, processor: Any, folder: Path) -> None:
        self._grid = math.isqrt(processor.max_num_patches)
        super().__init__(processor, self._grid * processor.patch_size, folder)

    def with_resize(self, is_squashed: bool, interpolation: str | None = None) -> GridPreprocess:
        """The same processor with another interpolation.

        Raises:
            FewShotError: A crop is asked for, which the processor has no setting for.
        """
        if not is_squashed:
            raise FewShotError(f"the image processor of {self._folder} can only squash images")
        changes = {} if interpolation is None else {"resample": _resampling(interpolation)}
        processor = type(self.processor).from_dict({**self.processor.to_dict(), **changes})
        return GridPreprocess(processor, self._folder)

    def _resized(self, image: Image.Image) -> Tensor:
        _, height, width = self.shape
        if image.width != image.height:
            image = image.resize((width, height), self.processor.resample)
        output = self.processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt",
            max_num_patches=self._grid**2,
        )  # fmt: skip
        side = self.processor.patch_size
        patches = output["pixel_values"][0].to(torch.uint8)
        patches = patches.view(self._grid, self._grid, side, side, 3)
        return patches.permute(4, 0, 2, 1, 3).reshape(self.shape)


def _resampling(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]
