"""The preprocessing of a transformers image processor, in the two halves of ``Preprocess``."""

from __future__ import annotations

import json
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
            changes["resample"] = Image.Resampling[interpolation.upper()]
        processor = type(self.processor).from_dict({**self.processor.to_dict(), **changes})
        return TransformersPreprocess(processor, height, self._folder)

    def _resized(self, image: Image.Image) -> Tensor:
        output = self.processor(
            images=image, do_rescale=False, do_normalize=False, return_tensors="pt"
        )
        return output["pixel_values"][0].to(torch.uint8)
