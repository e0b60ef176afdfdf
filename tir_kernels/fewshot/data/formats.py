"""The files that are images: raster formats that Pillow reads, known by their ending."""

from __future__ import annotations

import os
from functools import cache

from PIL import Image

# Left out are formats that are programs or drawings (EPS, WMF), that hold other things too (HDF5,
# MPEG), and those of icons and working copies that lie beside images and are none (ICO, PSD).
# TGA has no signature to be known by, so it is tried last.
_RASTER_FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "QOI", "PCX",
    "SGI", "SUN", "TGA",
)  # fmt: skip
# Pillow writes this format under a name of its own, and reads it as JPEG.
_READ_AS_ANOTHER = {"MPO"}

Image.init()
# Formats that ``PIL.Image.open(file, formats=RASTER_FORMATS)`` may open: those of the list that the
# installed Pillow has.
RASTER_FORMATS: tuple[str, ...] = tuple(name for name in _RASTER_FORMATS if name in Image.OPEN)


@cache
def image_endings() -> frozenset[str]:
    """The endings of files that are read, in lower case and with their dot."""
    formats = {*RASTER_FORMATS, *_READ_AS_ANOTHER}
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in formats
    )


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in image_endings()
