"""The fixed kinds of views on which published programs train beside each support image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

_DEGREES = 45.0
_JITTER = 0.4


@dataclass(frozen=True)
class FixedView:
    """The difference of one view from its image, in the order in which it is made.

    Args:
        angle: Degrees of a rotation about the middle, counter-clockwise; what comes from outside of
            the image is black.
        factors: Of brightness, contrast and saturation, applied in this order; ``None``: as it is.
        is_flipped: Whether left and right are exchanged.
    """

    angle: float = 0.0
    factors: tuple[float, float, float] | None = None
    is_flipped: bool = False


def draw_fixed_views(random: np.random.RandomState) -> list[FixedView]:
    """Draw the four views beside one image, as the program of arXiv 2605.25799 augments.

    A rotation with factors and a flip; a rotation; factors; a flip. Angles lie in [-45, 45], and
    factors in [0.6, 1.4]. A flip has a probability of 1/2, also in the view that has nothing else
    and without it is the image again.
    """
    return [
        FixedView(_angle(random), _factors(random), _flip(random)),
        FixedView(_angle(random)),
        FixedView(factors=_factors(random)),
        FixedView(is_flipped=_flip(random)),
    ]


def _angle(random: np.random.RandomState) -> float:
    return float(random.uniform(-_DEGREES, _DEGREES))


def _factors(random: np.random.RandomState) -> tuple[float, float, float]:
    brightness, contrast, saturation = random.uniform(1 - _JITTER, 1 + _JITTER, size=3).tolist()
    return brightness, contrast, saturation


def _flip(random: np.random.RandomState) -> bool:
    return bool(random.uniform() < 0.5)


def fixed_view(pixels: Tensor, view: FixedView) -> Tensor:
    """The view of an image, (3, H, W) uint8 on the CPU, of the same shape."""
    # By Pillow, as published, so that the pixels are the published program's and of no device.
    image = functional.to_pil_image(pixels)
    if view.angle:
        image = functional.rotate(image, view.angle, InterpolationMode.NEAREST)
    if view.factors is not None:
        brightness, contrast, saturation = view.factors
        image = functional.adjust_brightness(image, brightness)
        image = functional.adjust_contrast(image, contrast)
        image = functional.adjust_saturation(image, saturation)
    if view.is_flipped:
        image = functional.horizontal_flip(image)
    return functional.pil_to_tensor(image)
