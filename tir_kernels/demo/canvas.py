"""Parts that both drawn domains share: the pixel grid, its types, and smooth noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

IMAGE_SIZE = 64
ROWS, COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
_FREQUENCIES = np.hypot(np.fft.fftfreq(IMAGE_SIZE)[:, None], np.fft.rfftfreq(IMAGE_SIZE)[None, :])


def to_pixels(image: Array) -> Pixels:
    """Round and clip an image in 0..255 to uint8."""
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def smooth_noise(rng: np.random.Generator, scale: float) -> Array:
    """Zero-mean, unit-deviation noise (64, 64) whose features are about `scale` pixels wide."""
    spectrum = np.fft.rfft2(rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE)))
    noise = np.fft.irfft2(spectrum * np.exp(-((_FREQUENCIES * scale * 2.5) ** 2)), s=ROWS.shape)
    return ((noise - noise.mean()) / (noise.std() + 1e-9)).astype(np.float32)
