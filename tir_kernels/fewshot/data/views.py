"""Augmented views of support images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from tir_kernels.fewshot.data.fixed_views import draw_fixed_views, fixed_view
from tir_kernels.fewshot.fields import FIVE

_AREA = (0.08, 1.0)
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
_JITTER = 0.4
_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """The difference of one view from its image.

    Args:
        box: Top, left, height and width of the part that is enlarged, in pixels.
        is_flipped: Whether left and right are exchanged.
        brightness, contrast, saturation: Factors, applied in this order.
    """

    box: tuple[int, int, int, int]
    is_flipped: bool
    brightness: float
    contrast: float
    saturation: float


def draw_views(random: np.random.RandomState, count: int, height: int, width: int) -> list[View]:
    """Draw views as the cross-domain few-shot benchmark augments (arXiv 1912.07200).

    A part of 8 to 100 % of the area with a ratio of sides of 3/4 to 4/3, a horizontal flip for
    every second image, and factors of brightness, contrast and saturation in [0.6, 1.4].
    """
    return [
        View(
            _draw_box(random, height, width),
            bool(random.uniform() < 0.5),
            *random.uniform(1 - _JITTER, 1 + _JITTER, size=3).tolist(),
        )
        for _ in range(count)
    ]


def _draw_box(random: np.random.RandomState, height: int, width: int) -> tuple[int, int, int, int]:
    for _ in range(_ATTEMPTS):
        area = height * width * random.uniform(*_AREA)
        ratio = math.exp(random.uniform(*_LOG_RATIO))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(random.randint(height - box_height + 1))
            left = int(random.randint(width - box_width + 1))
            return top, left, box_height, box_width
    return 0, 0, height, width


def apply_view(pixels: Tensor, view: View) -> Tensor:
    """The view of an image, (3, H, W) uint8, of the same shape and on the same device."""
    image = functional.to_dtype(pixels, torch.float32, scale=True)
    image = functional.resized_crop(
        image, *view.box, list(pixels.shape[-2:]), InterpolationMode.BICUBIC, antialias=True
    ).clamp_(0, 1)
    if view.is_flipped:
        image = functional.horizontal_flip(image)
    image = functional.adjust_brightness(image, view.brightness)
    image = functional.adjust_contrast(image, view.contrast)
    image = functional.adjust_saturation(image, view.saturation)
    # Devices differ in the last bits, and rounding to pixels takes nearly all of that away.
    return image.mul_(255).round_().to(torch.uint8)


def views_per_image(augment: int | str) -> int:
    """The views of an image, itself included, by the setting ``augment``."""
    return 5 if augment == FIVE else 1 + int(augment)


def with_views(pixels: Tensor, augment: int | str, random: np.random.RandomState) -> Tensor:
    """Each image followed by its views.

    Args:
        pixels: (S, 3, H, W) uint8, on any device.
        augment: Random views of each image, see ``draw_views``; or "five" for the fixed kinds of
            ``draw_fixed_views``, of which the image is the first.
        random: Generator that they are drawn with, on the CPU.

    Returns:
        (S * V, 3, H, W) uint8, V as ``views_per_image`` says.
    """
    if augment == FIVE:
        images = [
            each
            for image in pixels.cpu()
            for each in (image, *(fixed_view(image, view) for view in draw_fixed_views(random)))
        ]
        return torch.stack(images).to(pixels.device)
    views = int(augment)
    drawn = iter(draw_views(random, len(pixels) * views, *pixels.shape[-2:]))
    return torch.stack(
        [
            each
            for image in pixels
            for each in (image, *(apply_view(image, next(drawn)) for _ in range(views)))
        ]
    )
