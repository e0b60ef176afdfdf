"""A model's preprocessing in two halves: pixels from an image, and the model's input from pixels.

The pixels are what is worth keeping: a quarter of the input's size, and the same for any mean.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import PIL
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import normalize

# Scaled to the model's size by its short side, a longer strip would fill the memory.
_MOST_RATIO = 1000

# Goes up when the same settings give other pixels.
_VERSION = 1


class Preprocess:
    """open_clip's preprocessing for evaluation.

    Called with an RGB image it gives the model's (3, H, W) float32 input; the two halves of that
    are ``to_pixels`` and ``normalise``.

    Args:
        config: Size, resizing and normalisation.

    Attributes:
        config: As given.
        shape: (3, H, W) of an image.
        version: Text that differs wherever the pixels of an image may differ.

    Raises:
        AssertionError: A setting that open_clip does not know.
    """

    def __init__(self, config: PreprocessCfg) -> None:
        *resize, _to_tensor, normalize_ = image_transform_v2(config, is_train=False).transforms
        self._mean, self._std = normalize_.mean, normalize_.std
        self._resize = Compose(resize)
        self.config = config
        height, width = (
            config.size if isinstance(config.size, (tuple, list)) else 2 * (config.size,)
        )
        self.shape = (3, height, width)
        self.version = json.dumps([_VERSION, int(PIL.__version__.split(".")[0]), asdict(config)])

    def with_resize(self, is_squashed: bool, interpolation: str | None = None) -> Preprocess:
        """The same with another way to the model's size.

        Args:
            is_squashed: Whether both sides are scaled, in place of the shorter one and a crop.
            interpolation: "bicubic" or "bilinear"; ``None``: as it is.
        """
        return Preprocess(
            replace(
                self.config,
                resize_mode="squash" if is_squashed else "shortest",
                interpolation=interpolation or self.config.interpolation,
            )
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """The model's input, (3, H, W) float32, of an RGB image."""
        return self.normalise(self.to_pixels(image))

    def to_pixels(self, image: Image.Image) -> Tensor:
        """An RGB image resized and cropped, (3, H, W) uint8.

        Raises:
            ValueError: One side is more than 1000 times the other.
        """
        if max(image.size) > _MOST_RATIO * min(image.size):
            raise ValueError(
                f"it is a strip of {image.width} x {image.height} pixels; one side may be at most "
                f"{_MOST_RATIO} times the other"
            )
        return self._resized(image)

    def _resized(self, image: Image.Image) -> Tensor:
        # In NumPy, since PyTorch's threads would get into each other's way where several decode.
        pixels = np.asarray(self._resize(image)).transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy())

    def normalise(self, pixels: Tensor) -> Tensor:
        """The model's input, (..., 3, H, W) float32, of (..., 3, H, W) uint8 pixels.

        On any device it has the bits that open_clip's own transform gives on the CPU.
        """
        # GPUs multiply by the reciprocal of a number, which rounds differently; not of a tensor.
        scale = torch.full((), 255.0, dtype=torch.float32, device=pixels.device)
        images = pixels.to(torch.float32).div_(scale)
        return normalize(images, self._mean, self._std, inplace=True)

    def to_image(self, images: Tensor) -> np.ndarray:
        """(..., H, W, 3) uint8 pixels of the model's input (..., 3, H, W): ``normalise`` undone."""
        mean, std = (
            torch.tensor(each, device="cpu")[:, None, None] for each in (self._mean, self._std)
        )
        pixels = (255 * (images.cpu().float() * std + mean)).round().clamp(0, 255)
        return pixels.to(torch.uint8).movedim(-3, -1).numpy()
