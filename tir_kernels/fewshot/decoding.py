"""From an image file of any kind to an RGB image."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

# What Pillow raises for a file that is missing, damaged or no image.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def decode(file: Path | IO[bytes]) -> Image.Image:
    """Decode an image as RGB; an orientation noted in its metadata is not applied.

    Raises:
        DECODE_ERRORS: The file can't be read.
    """
    with Image.open(file) as image:
        if image.mode.startswith("I;16"):
            # Pillow's own conversion clips at 255, which turns such an image white.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
