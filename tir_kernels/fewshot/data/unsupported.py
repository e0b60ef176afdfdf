"""The kinds of files that are not read as images, for the sentence that refuses them."""

from __future__ import annotations

from contextlib import suppress
from typing import IO

from PIL import TiffImagePlugin

from tir_kernels.fewshot.data.rgb import UnreadableImageError, multispectral

_START_BYTES = 512
_BITS, _SAMPLES, _SAMPLE_FORMAT = 258, 277, 339
_KINDS_OF_NUMBERS = {2: " of signed numbers", 3: " of floating-point numbers"}

# What files of a kind begin with, after so many bytes.
_MARKS = (
    (0, b"%!PS", "an EPS or PostScript drawing"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS drawing"),
    (0, b"%PDF", "a PDF document"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (40, b" EMF", "a Windows metafile"),
    (128, b"DICM", "a DICOM file"),
    (0, b"SIMPLE  =", "a FITS file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"CDF", "a NetCDF file"),
    (0, b"GRIB", "a GRIB file"),
    (0, b"BUFR", "a BUFR file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (344, b"n+1", "a NIfTI volume"),
    (4, b"ftypheic", "a HEIC image"),
    (4, b"ftypheix", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (4, b"JXL ", "a JPEG XL image"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, whose file was not fetched"),
)
_TEXTS = (("<!doctype html", "a web page"), ("<html", "a web page"), ("<svg", "an SVG drawing"))


def refusal(file: IO[bytes]) -> UnreadableImageError:
    """The reason that no format read here fits a file, as far as its first bytes tell."""
    file.seek(0)
    start = file.read(_START_BYTES)
    if not start:
        return UnreadableImageError("it is empty")
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _refused_tiff(file)
    kind = next((kind for at, mark, kind in _MARKS if start[at:].startswith(mark)), None)
    text = start.decode("latin-1").lower()
    kind = kind or next((kind for tag, kind in _TEXTS if tag in text), None)
    if kind is None:
        return UnreadableImageError("it is damaged, or no image in a format that is read here")
    return UnreadableImageError(
        f"it is {kind}, which is not read here", "replace it by an image, PNG for instance"
    )


def _refused_tiff(file: IO[bytes]) -> UnreadableImageError:
    with suppress(Exception):  # of damaged files nothing is known
        file.seek(0)
        header = file.read(8)
        if header[2:4] in (b"+\0", b"\0+"):
            header += file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        bands, bits = int(tags.get(_SAMPLES, 1)), tags.get(_BITS, (1,))
        if bands > 3:
            return multispectral(bands)
        kind = _KINDS_OF_NUMBERS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
        size = f"{bands} band{'s' if bands > 1 else ''} of {bits[0]} bits{kind}"
        return UnreadableImageError(
            f"it is a TIFF image of {size}, which is damaged or of a kind that Pillow can't read",
            "convert it to a usual 8-bit RGB or grey image",
        )
    return UnreadableImageError("it is a damaged TIFF image")
