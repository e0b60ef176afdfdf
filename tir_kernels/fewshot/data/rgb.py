"""Conversion of an image of any mode to RGB, by one rule that is the same for all images.

docs/images.md has the rule in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from enum import Flag, auto

import numpy as np
from PIL import Image, ImageFile

from tir_kernels.text import Notice, setting

# Goes up when the same file gives other RGB values.
VERSION = 2

_WHITE, _WHITE_16 = 255, 65535
_MOST_SAMPLES = 4  # red, green, blue and alpha, or the four of CMYK

# Tags of TIFF files.
_PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 262, 277, 338, 339
_WHITE_IS_ZERO, _SIGNED = 0, (2,)
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}  # per photometric interpretation; the others have one

# Of the 2 and 4 bits of grey PNG images to 8.
_SCALES = {"L;2": 85, "L;4": 17}

_ITS_RANGE = f"convert it to 8 bits, in one way for all images, or pass {setting('white_value')}"


class UnreadableImageError(Exception):
    """A file whose content can't be made an RGB image.

    Args:
        message: The reason, as the end of "can't read the image x.png: ...".
        advice: The remedy. Both may name settings by ``tir_kernels.text.setting``.
        is_lasting: Whether reading the same content again, here, would fail again.
    """

    def __init__(
        self, message: str, advice: str = "repair or remove it", *, is_lasting: bool = True
    ) -> None:
        self.notice = Notice(message)
        super().__init__(str(self.notice))
        self.advice = Notice(advice)
        self.is_lasting = is_lasting


class Conversion(Flag):
    """The losses of an image on its way to RGB; the numbers are kept in files."""

    WIDE = auto()
    DARK = auto()
    WHITE_VALUE = auto()
    FLOAT = auto()
    TRANSPARENT = auto()
    FRAMES = auto()
    CMYK = auto()
    BANDS = auto()


NOTES = {
    Conversion.WIDE: "has more than 8 bits per value, of which the upper 8 are kept",
    Conversion.DARK: "uses less than a sixteenth of its range, so little can be told apart; if "
    "white is a smaller value in all images, 4095 for instance, pass "
    f"{setting('white_value', 4095)} (grey images), or convert them to 8 bits, in one way for all",
    Conversion.WHITE_VALUE: f"is converted to 8 bits with {setting('white_value')} as white and "
    "0 as black",
    Conversion.FLOAT: "has floating-point values, of which 0 is black and 1 is white",
    Conversion.TRANSPARENT: "is transparent in parts and placed on white",
    Conversion.FRAMES: "has several frames or pages, of which the first is used",
    Conversion.CMYK: "is for print (CMYK) and converted to RGB without its colour profile",
    Conversion.BANDS: "has a band beside its colours that is left out",
}


def to_rgb(
    image: ImageFile.ImageFile, white_value: float | None = None
) -> tuple[Image.Image, Conversion]:
    """An image as RGB, and what it lost.

    The values of 8-bit RGB, grey and palette images without transparency stay as they are.

    Args:
        image: Opened, not loaded yet.
        white_value: The value that becomes white in grey images of more than 8 bits whose files do
            not say it themselves; ``None``: the type's largest, and 1 for floating-point values.

    Raises:
        UnreadableImageError: The meaning of its values can't be known, or it has too many bands.
    """
    lost_bands = _check_samples(image)
    raw_modes = tuple(_raw_modes(image))  # gone once the image is loaded
    stated_white = _stated_white(image, raw_modes)
    is_wide = _largest_of_ppm(image) > _WHITE or any(
        raw_mode.endswith((";16B", ";16L", ";16N")) for raw_mode in raw_modes
    )
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        rgb, lost = _from_wide_grey(image, raw_modes, stated_white, white_value)
    else:
        rgb, lost = _from_bytes(image, raw_modes)
        if is_wide:
            if white_value is not None and stated_white is None:
                raise UnreadableImageError(
                    f"{setting('white_value')} can't be heeded, since Pillow reads only the "
                    "upper 8 of its 16 "
                    "bits",
                    "convert it to 8 bits, in one way for all images",
                )
            lost |= Conversion.WIDE | _dark(int(np.asarray(rgb).max()))
    with suppress(Exception):  # the frames that follow may be damaged: they are not used
        if getattr(image, "is_animated", False):
            lost |= Conversion.FRAMES
    return rgb, lost_bands | lost


def _check_samples(image: ImageFile.ImageFile) -> Conversion:
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return Conversion(0)
    samples = tags.get(_SAMPLES, 1)
    if samples > _MOST_SAMPLES:
        raise multispectral(samples)
    if image.mode == "L" and tags.get(_SAMPLE_FORMAT) == _SIGNED:
        raise UnreadableImageError("its values are signed", "convert it to unsigned 8 bits")
    extra = samples - _COLOURS.get(tags.get(_PHOTOMETRIC), 1)
    # Of these kinds the first may be alpha; 0 is for bands of no stated meaning.
    is_other = extra > 0 and tags.get(_EXTRA_SAMPLES, (2,))[0] == 0
    return Conversion.BANDS if is_other else Conversion(0)


def multispectral(bands: int) -> UnreadableImageError:
    """The refusal of an image of more bands than colours."""
    return UnreadableImageError(
        f"it has {bands} bands, and multispectral images are not supported",
        "write its red, green and blue as an RGB image of 8 bits",
    )


def _raw_modes(image: ImageFile.ImageFile) -> Iterator[str]:
    """Pillow's names of the values as they are in the file, such as "RGB;16B"."""
    for tile in image.tile:
        arguments = tile[3]
        if isinstance(arguments, tuple):
            arguments = arguments[0] if arguments else None
        if isinstance(arguments, str):
            yield arguments


def _stated_white(image: ImageFile.ImageFile, raw_modes: tuple[str, ...]) -> float | None:
    """The white of grey values of more than 8 bits, where the file says it."""
    if _WHITE < _largest_of_ppm(image) < _WHITE_16:
        return _WHITE_16  # to which Pillow scales the values
    if image.format == "JPEG2000" and image.mode.startswith("I;16"):
        return _WHITE_16  # as above
    return 4095 if "I;12" in raw_modes else None


def _largest_of_ppm(image: ImageFile.ImageFile) -> int:
    """The value of white in the file of a netpbm image, where Pillow scales it; else 0."""
    if image.format != "PPM" or not image.tile or image.tile[0][0] not in ("ppm", "ppm_plain"):
        return 0
    arguments = image.tile[0][3]
    largest = arguments[1] if isinstance(arguments, tuple) else 0
    return largest if isinstance(largest, int) else 0


def _from_wide_grey(
    image: Image.Image,
    raw_modes: tuple[str, ...],
    stated_white: float | None,
    white_value: float | None,
) -> tuple[Image.Image, Conversion]:
    values = np.asarray(image)
    white = stated_white or white_value
    lost = Conversion.WHITE_VALUE if white and not stated_white else Conversion(0)
    if image.mode == "F":
        lost |= Conversion.FLOAT if white is None else Conversion(0)
        levels = _levels_of_floats(values, white)
    else:
        is_unsigned_16 = image.mode.startswith("I;16") or (
            image.format == "PPM" or any(raw in ("I;16", "I;16B") for raw in raw_modes)
        )
        if white is None and not is_unsigned_16:
            raise UnreadableImageError(
                "its values are signed or of 32 bits, and which of them is white can't be known",
                _ITS_RANGE,
            )
        if "I;32N" in raw_modes and values.min(initial=0) < 0:  # Pillow's mode I is signed
            raise UnreadableImageError("it has values above 2147483647", _ITS_RANGE)
        if white is None or stated_white:
            lost |= Conversion.WIDE
        # For 16 bits these are the upper 8, as Pillow itself takes them from colour images.
        levels = (
            np.clip(values, 0, None).astype(np.float64) * (_WHITE + 1) // ((white or _WHITE_16) + 1)
        )
        lost |= _dark(levels.max())
    grey = np.minimum(levels, _WHITE).astype(np.uint8)
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow heeds for 8 bits only
        grey = _WHITE - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and (mask := values == transparent).any():
        grey[mask] = _WHITE
        lost |= Conversion.TRANSPARENT
    return Image.fromarray(grey).convert("RGB"), lost


def _levels_of_floats(values: np.ndarray, white: float | None) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UnreadableImageError("it has values that are no numbers", _ITS_RANGE)
    low, high = values.min(), values.max()
    if white is None and (low < 0 or high > 1):
        raise UnreadableImageError(
            f"its floating-point values go from {low:g} to {high:g}, and only 0 to 1 have a "
            "meaning without being told",
            _ITS_RANGE,
        )
    return np.floor(np.clip(values.astype(np.float64), 0, None) * ((_WHITE + 1) / (white or 1)))


def _dark(highest: float) -> Conversion:
    # One image alone may be a picture of the night; a range that is not used shows in all of them.
    return Conversion.DARK if 0 < highest < (_WHITE + 1) // 16 else Conversion(0)


def _from_bytes(image: Image.Image, raw_modes: tuple[str, ...]) -> tuple[Image.Image, Conversion]:
    if image.mode in ("LAB", "HSV"):
        raise UnreadableImageError(f"its colours are {image.mode}", "convert it to RGB")
    if not image.has_transparency_data:
        lost = Conversion.CMYK if image.mode == "CMYK" else Conversion(0)
        return image.convert("RGB"), lost
    _scale_transparent_value(image, raw_modes)
    rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    lowest, highest = rgba.getchannel("A").getextrema()
    if lowest == _WHITE:
        return rgba.convert("RGB"), Conversion(0)
    if highest == 0:
        raise UnreadableImageError(
            "it is transparent everywhere, so nothing of it is visible",
            "remove its alpha channel, or the image",
        )
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), Conversion.TRANSPARENT


def _scale_transparent_value(image: Image.Image, raw_modes: tuple[str, ...]) -> None:
    """Scale the transparent value of a PNG image as Pillow scales its pixels, but not this."""
    value = image.info.get("transparency")
    (raw_mode,) = raw_modes if len(raw_modes) == 1 else ("",)
    if isinstance(value, int) and raw_mode in _SCALES:
        image.info["transparency"] = value * _SCALES[raw_mode]
    elif isinstance(value, tuple) and raw_mode.endswith(";16B"):
        image.info["transparency"] = tuple(part >> 8 for part in value)
