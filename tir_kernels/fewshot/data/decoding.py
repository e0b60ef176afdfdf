"""Decoding of image files of any kind as RGB images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from tir_kernels.errors import first_line
from tir_kernels.fewshot.data.formats import RASTER_FORMATS
from tir_kernels.fewshot.data.rgb import VERSION, Conversion, UnreadableImageError, to_rgb
from tir_kernels.fewshot.data.unsupported import refusal
from tir_kernels.files import open_regular
from tir_kernels.text import setting

# What it logs of a refused file is in the refusal, and without this it would go to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Decoding:
    """The way in which image files are decoded.

    Args:
        max_pixels: Most pixels of an image; ``None``: the limit of Pillow, which guards against
            small files that fill the memory. A larger number raises it for the whole process.
        white_value: The value that becomes white in grey images of more than 8 bits whose files do
            not say it; ``None``: the type's largest, and 1 for floating-point values.

    Raises:
        ValueError: A number is not above 0.
    """

    max_pixels: int | None = None
    white_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_pixels", "white_value"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, not {value}")

    @property
    def version(self) -> tuple[int, float | None]:
        """A text that differs wherever an image's RGB values may differ."""
        return VERSION, None if self.white_value is None else float(self.white_value)

    def decode(self, file: Path | IO[bytes]) -> tuple[Image.Image, Conversion]:
        """Decode an image as RGB, and say what it lost.

        An orientation noted in its metadata is not applied, but for TIFF, where Pillow does it.

        Raises:
            OSError: The file can't be had, at least now.
            UnreadableImageError: Its content is damaged, or no image that is read here.
        """
        with ExitStack() as stack, problems_explained():
            if isinstance(file, Path):
                file = stack.enter_context(open_regular(file))
            if self.max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
                Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, self.max_pixels)
            try:
                image = stack.enter_context(Image.open(file, formats=RASTER_FORMATS))
            except UnidentifiedImageError:
                # Not lasting: it is found out quickly, and another Pillow may read the format.
                error = refusal(file)
                error.is_lasting = False
                raise error from None
            pixels = image.width * image.height
            if self.max_pixels is not None and pixels > self.max_pixels:
                raise _too_large(f"it has {pixels} pixels, more than {self.max_pixels}")
            return to_rgb(image, self.white_value)


@contextmanager
def problems_explained() -> Iterator[None]:
    """Turn what Pillow raises for damaged images, which may be anything, into one exception."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(first_line(error)) from error
    except MemoryError as error:
        raise UnreadableImageError(
            "there is not enough memory to decode it", "make it smaller", is_lasting=False
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system: the file may be there again tomorrow
        raise UnreadableImageError(first_line(error)) from error


def _too_large(why: str) -> UnreadableImageError:
    return UnreadableImageError(
        why,
        f"make it smaller, or pass {setting('max_pixels', 'N')} with a larger N if it can be "
        "trusted",
        is_lasting=False,
    )
