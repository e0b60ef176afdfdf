"""The files that are taken for images, and what Pillow may open them as."""

import io

import pytest
from PIL import Image

from tir_kernels.fewshot.data.formats import RASTER_FORMATS, image_endings, is_image_name

FORMATS = ["JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA"]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_pillow_writes_has_an_ending_and_is_opened(kind):
    if kind == "AVIF" and kind not in RASTER_FORMATS:
        pytest.skip("this Pillow is without AVIF")
    endings = {end for end, name in Image.registered_extensions().items() if name == kind}
    assert endings
    assert endings <= image_endings()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    with Image.open(buffer, formats=RASTER_FORMATS) as image:
        red, green, blue = image.convert("RGB").getpixel((4, 4))
    assert min(red, 255 - green, 255 - blue) > 245


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPG", "b/c.d.gif", "a.avif", "a.pgm", "a.jp2", "for\udceat.webp"]
)
def test_image_names(name):
    assert is_image_name(name)


@pytest.mark.parametrize(
    "name",
    ["a.eps", "a.ps", "a.pdf", "a.wmf", "a.mpg", "a.h5", "a.dcm", "a.ico", "a.svg", "a", ".jpg"],
)
def test_other_names(name):
    assert not is_image_name(name)


def test_scripts_are_never_opened():
    script = io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(script, formats=RASTER_FORMATS)
