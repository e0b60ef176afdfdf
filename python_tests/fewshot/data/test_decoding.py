"""Every kind of image becomes RGB by one rule, or is refused with the reason."""

import io
import os
import re
import struct
import subprocess
import zlib

import numpy as np
import pytest
from image_files import encoded, tiff
from PIL import Image

from tir_kernels.fewshot.data import decoding
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.rgb import Conversion, UnreadableImageError

NOTHING = Conversion(0)
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([RAMP, RAMP.T, RAMP[::-1]], axis=2)
RAMP16 = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1023
COLOUR16 = COLOUR.astype(np.uint16) * 257


def decoded(content, **options):
    image, lost = Decoding(**options).decode(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image), lost


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


def pgm(values, largest):
    height, width = values.shape
    return b"P5 %d %d %d\n" % (width, height, largest) + values.astype(">u2").tobytes()


ORDINARY = {
    "png": encoded(Image.fromarray(COLOUR)),
    "grey png": encoded(Image.fromarray(RAMP)),
    "jpeg": encoded(Image.fromarray(COLOUR), "JPEG"),
    "grey jpeg": encoded(Image.fromarray(RAMP), "JPEG"),
    "progressive": encoded(Image.fromarray(COLOUR), "JPEG", progressive=True),
    "palette": encoded(Image.fromarray(COLOUR).quantize(20)),
    "one bit": encoded(Image.fromarray(RAMP).convert("1")),
    "gif": encoded(Image.fromarray(COLOUR).quantize(20), "GIF"),
    "bmp": encoded(Image.fromarray(COLOUR), "BMP"),
    "webp": encoded(Image.fromarray(COLOUR), "WEBP", lossless=True),
    "tiff": encoded(Image.fromarray(COLOUR), "TIFF"),
    "lzw tiff": encoded(Image.fromarray(COLOUR), "TIFF", compression="tiff_lzw"),
    "ppm": encoded(Image.fromarray(COLOUR), "PPM"),
    "opaque": encoded(Image.fromarray(COLOUR).convert("RGBA")),
    "opaque grey": encoded(Image.fromarray(RAMP).convert("LA")),
    "opaque palette": encoded(Image.fromarray(COLOUR).quantize(20), transparency=99),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_images_have_the_values_that_pillow_gives(kind):
    with Image.open(io.BytesIO(ORDINARY[kind])) as image:
        expected = np.asarray(image.convert("RGB"))
    pixels, lost = decoded(ORDINARY[kind])
    assert np.array_equal(pixels, expected)
    assert lost == NOTHING


WIDE = {
    "png": encoded(Image.fromarray(RAMP16)),
    "tiff": tiff(RAMP16[..., None]),
    "big-endian tiff": tiff(RAMP16[..., None], byte_order=">"),
    "lzw tiff": encoded(Image.fromarray(RAMP16), "TIFF", compression="tiff_lzw"),
    "pgm": pgm(RAMP16, 65535),
    "jpeg 2000": encoded(Image.fromarray(RAMP16), "JPEG2000"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_of_16_bits_the_upper_8_are_kept(kind):
    pixels, lost = decoded(WIDE[kind])
    assert np.array_equal(pixels, grey(RAMP16 >> 8))
    assert lost == Conversion.WIDE


def test_of_16_bits_of_colours_the_upper_8_are_kept():
    for content in (
        tiff(COLOUR16, photometric=2),
        tiff(COLOUR16, photometric=2, byte_order=">"),
        b"P6 8 8 65535\n" + COLOUR16.astype(">u2").tobytes(),
    ):
        pixels, lost = decoded(content)
        assert np.array_equal(pixels, COLOUR)
        assert lost == Conversion.WIDE


def packed_12_bits(values):
    """Two values in three bytes, as TIFF stores them."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    joined = pairs[:, 0] << 12 | pairs[:, 1]
    in_bytes = np.stack([joined >> 16, joined >> 8 & 255, joined & 255], 1)
    return in_bytes.astype(np.uint8).reshape(len(values), -1, 1)


def test_a_range_that_the_file_states_is_the_range():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 65
    for content in (
        pgm(values, 4095),
        b"P2 8 8 4095\n" + b" ".join(b"%d" % value for value in values.flat),
        tiff(packed_12_bits(values), bits=12, width=8),
    ):
        for options in ({}, {"white_value": 300}):
            pixels, lost = decoded(content, **options)
            assert np.array_equal(pixels, grey(values >> 4))
            assert lost == Conversion.WIDE
    assert decoded(b"P5 2 1 15\n\0\x0f")[0].tolist() == [[[0] * 3, [255] * 3]]


def test_white_is_zero():
    assert np.array_equal(decoded(tiff(RAMP[..., None], photometric=0))[0], grey(255 - RAMP))
    wide = decoded(tiff(RAMP16[..., None], photometric=0))[0]
    assert np.array_equal(wide, grey(255 - (RAMP16 >> 8)))
    floats = (RAMP / np.float32(255))[..., None]
    inverted = decoded(tiff(floats, photometric=0, kind=3))[0]
    assert np.array_equal(inverted, grey(255 - RAMP))


def test_one_rule_whatever_an_image_holds():
    """The brightness of an image depends on no other value in it."""
    for highest in (5000, 65535):
        values = np.array([[4096, highest]], np.uint16)
        assert decoded(encoded(Image.fromarray(values)))[0][0, 0].tolist() == [16] * 3
        assert decoded(encoded(Image.fromarray(values)), white_value=8191)[0][0, 0, 0] == 128
    for highest in (0.6, 1.0):
        values = np.array([[[0.5], [highest]]], np.float32)
        assert decoded(tiff(values, kind=3))[0][0, 0, 0] == 128


def test_a_range_that_is_not_used_is_told():
    values = np.array([[0, 4095]], np.uint16)
    lost = Conversion.WIDE | Conversion.DARK
    assert decoded(encoded(Image.fromarray(values)))[1] == lost
    assert decoded(tiff(np.full((2, 2, 3), 4000, np.uint16), photometric=2))[1] == lost
    assert decoded(encoded(Image.fromarray(values * 16)))[1] == Conversion.WIDE


@pytest.mark.parametrize(
    ("values", "kind"),
    [(np.uint16, 1), (np.int16, 2), (np.uint32, 1), (np.int32, 2), (np.float32, 3)],
)
def test_a_white_value_of_the_user(values, kind):
    content = tiff(np.array([[[0], [1500], [3000], [9000]]], values), kind=kind)
    pixels, lost = decoded(content, white_value=3000)
    assert pixels[..., 0].tolist() == [[0, 127 if kind != 3 else 128, 255, 255]]
    assert lost == Conversion.WHITE_VALUE
    if kind == 2:
        content = tiff(np.array([[[-5], [3000]]], values), kind=kind)
        assert decoded(content, white_value=3000)[0][..., 0].tolist() == [[0, 255]]


def test_floating_point_values():
    pixels, lost = decoded(tiff((RAMP / np.float32(255))[..., None], kind=3))
    assert np.array_equal(pixels, grey(RAMP))
    assert lost == Conversion.FLOAT


def refused(content, **options):
    with pytest.raises(UnreadableImageError) as error:
        Decoding(**options).decode(io.BytesIO(content))
    return f"{error.value}; {error.value.advice}"


def one(value, type_):
    return np.full((2, 2, 1), value, type_)


REFUSALS = {
    "signed 8": (tiff(one(-3, np.int8), kind=2), "its values are signed; convert"),
    "signed 16": (tiff(one(-3, np.int16), kind=2), "signed or of 32 bits.*white_value"),
    "signed 32": (tiff(one(3, np.int32), kind=2), "signed or of 32 bits.*white_value"),
    "unsigned 32": (tiff(one(3, np.uint32)), "signed or of 32 bits.*white_value"),
    "float above 1": (tiff(one(912, np.float32), kind=3), "go from 912 to 912.*white_value"),
    "float below 0": (tiff(one(-0.5, np.float32), kind=3), "go from -0.5 to -0.5"),
    "not a number": (tiff(one(np.nan, np.float32), kind=3), "values that are no numbers"),
    "lab": (encoded(Image.new("LAB", (4, 4)), "TIFF"), "its colours are LAB; convert it to RGB"),
    "transparent": (
        encoded(Image.new("RGBA", (4, 4))),
        "transparent everywhere.*; remove its alpha channel",
    ),
    "13 bands": (
        tiff(np.ones((2, 2, 13), np.uint16), extra=[0] * 12),
        "it has 13 bands, and multispectral images are not supported; write its red, green",
    ),
    "13 bands in other order": (
        tiff(np.ones((2, 2, 13), np.uint16), byte_order=">"),
        "it has 13 bands, and multispectral",
    ),
    "4 bands": (tiff(np.ones((2, 2, 4), np.uint16)), "it has 4 bands, and multispectral"),
    "5 bands with colours": (
        tiff(np.ones((2, 2, 5), np.uint8), photometric=2, extra=[0, 0]),
        "it has 5 bands, and multispectral",
    ),
    "3 grey bands": (
        tiff(np.ones((2, 2, 3), np.uint16)),
        "TIFF image of 3 bands of 16 bits, which .* Pillow can't read; convert it",
    ),
    "3 float bands": (
        tiff(np.ones((2, 2, 3), np.float32), photometric=2, kind=3),
        "3 bands of 32 bits of floating-point numbers",
    ),
    "damaged tiff": (b"II*\0" + bytes(40), "a damaged TIFF|0 bits|1 band"),
    "empty": (b"", "it is empty; repair or remove it"),
    "text": (b"hello", "damaged, or no image in a format that is read here; repair"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "an EPS or PostScript drawing"),
    "pdf": (b"%PDF-1.7", "a PDF document, which is not read here; replace it by an image"),
    "dicom": (bytes(128) + b"DICM", "a DICOM file"),
    "web page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "svg": (b'<?xml version="1.0"?>\n<svg>', "an SVG drawing"),
    "heic": (b"\0\0\0 ftypheic", "a HEIC image"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "cut": (ORDINARY["png"][:-60], "[Tt]runcated"),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_converted_is_refused_with_the_reason(kind):
    content, reason = REFUSALS[kind]
    text = refused(content)
    assert re.search(reason, text), text
    assert "object at 0x" not in text


def test_white_value_does_not_reach_what_pillow_drops():
    assert "only the upper 8" in refused(tiff(COLOUR16, photometric=2), white_value=3000)
    assert "above 2147483647" in refused(tiff(one(2**31, np.uint32)), white_value=3000)
    with pytest.raises(ValueError, match="white_value must be above 0, not -1"):
        Decoding(white_value=-1)


def test_an_eps_under_an_images_name_starts_no_program(monkeypatch):
    def start(*arguments, **options):
        raise AssertionError(arguments)

    monkeypatch.setattr(subprocess, "Popen", start)
    eps = encoded(Image.fromarray(COLOUR), "EPS")
    assert "an EPS or PostScript drawing" in refused(eps)


CLEAR = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
CLEAR.putpixel((1, 0), (9, 9, 9, 0))
GREY_16 = np.array([[0x1234, 0xFF00]], np.uint16)


def clear_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((0, 0), 1)
    return image


TRANSPARENT = {
    "rgba": (encoded(CLEAR), [[200, 0, 0], [255] * 3]),
    "rgba tiff": (encoded(CLEAR, "TIFF"), [[200, 0, 0], [255] * 3]),
    "webp": (encoded(CLEAR, "WEBP", lossless=True), [[200, 0, 0], [255] * 3]),
    "grey alpha": (encoded(CLEAR.convert("LA")), [[60] * 3, [255] * 3]),
    "palette": (encoded(clear_palette(), transparency=0), [[200, 0, 0], [255] * 3]),
    "palette with alphas": (
        encoded(clear_palette(), transparency=b"\0\xff"),
        [[200, 0, 0], [255] * 3],
    ),
    "gif": (encoded(clear_palette(), "GIF", transparency=0), [[200, 0, 0], [255] * 3]),
    "colour": (
        encoded(Image.fromarray(np.uint8([[[200, 0, 0], [1, 2, 3]]])), transparency=(1, 2, 3)),
        [[200, 0, 0], [255] * 3],
    ),
    "grey": (encoded(Image.fromarray(np.uint8([[7, 8]])), transparency=8), [[7] * 3, [255] * 3]),
    "grey of 16 bits": (
        encoded(Image.fromarray(GREY_16), transparency=0x1234),
        [[255] * 3, [255] * 3],
    ),
    "half": (encoded(Image.new("RGBA", (2, 1), (0, 0, 255, 51))), [[204, 204, 255]] * 2),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_images_are_placed_on_white(kind):
    content, expected = TRANSPARENT[kind]
    pixels, lost = decoded(content)
    assert pixels.tolist() == [expected]
    assert lost & Conversion.TRANSPARENT


def grey_png(bits, row, transparent):
    """A grey PNG image of few bits a value, which Pillow does not write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", len(row), 1, bits, 0, 0, 0, 0)
    packed = sum(value << 8 - bits * (n + 1) for n, value in enumerate(row))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", struct.pack(">H", transparent))
        + chunk(b"IDAT", zlib.compress(bytes([0, packed])))
        + chunk(b"IEND", b"")
    )


def test_the_transparent_grey_of_few_bits():
    pixels, lost = decoded(grey_png(2, [0, 1, 2, 3], transparent=1))
    assert pixels[0, :, 0].tolist() == [0, 255, 170, 255]
    assert lost == Conversion.TRANSPARENT
    assert decoded(grey_png(4, [3, 8], transparent=3))[0][0, :, 0].tolist() == [255, 136]


def test_other_things_that_are_told():
    frames = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1])]
    for kind in ("PNG", "TIFF", "GIF"):
        first = decoded(encoded(frames[0], kind))[0]
        both = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        pixels, lost = decoded(both)
        assert np.array_equal(pixels, first), kind
        assert lost == Conversion.FRAMES
    cmyk = encoded(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "JPEG", quality=100)
    pixels, lost = decoded(cmyk)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 4
    assert lost == Conversion.CMYK
    pixels, lost = decoded(tiff(np.dstack([COLOUR, RAMP]), photometric=2, extra=[0]))
    assert np.array_equal(pixels, COLOUR)
    assert lost == Conversion.BANDS


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels(small_limit):
    content = encoded(Image.fromarray(COLOUR))
    text = refused(content)
    assert "64 pixels" in text
    assert "pass max_pixels=N with a larger N" in text
    assert "64 pixels, more than 63" in refused(content, max_pixels=63)
    for kind in ("PNG", "TIFF", "WEBP", "GIF"):
        assert decoded(encoded(Image.fromarray(COLOUR), kind), max_pixels=64)[0].shape == (8, 8, 3)
    with pytest.raises(ValueError, match="max_pixels must be above 0, not 0"):
        Decoding(max_pixels=0)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="not a regular file"):
        Decoding().decode(tmp_path / "pipe.png")
    (tmp_path / "real.png").write_bytes(ORDINARY["png"])
    (tmp_path / "link.png").symlink_to("real.png")
    assert np.array_equal(np.asarray(Decoding().decode(tmp_path / "link.png")[0]), COLOUR)


@pytest.mark.parametrize("error", [EOFError, IndexError, struct.error, KeyError, OverflowError])
def test_whatever_pillow_raises_the_image_is_unreadable(monkeypatch, error):
    def fail(*arguments):
        raise error("a mishap\nand more")

    monkeypatch.setattr(decoding, "to_rgb", fail)
    assert "a mishap" in refused(ORDINARY["png"])


def test_what_may_pass_is_not_taken_for_damage(monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(decoding, "to_rgb", fail)
    with pytest.raises(UnreadableImageError, match="not enough memory") as error:
        Decoding().decode(io.BytesIO(ORDINARY["png"]))
    assert not error.value.is_lasting


def test_files_are_not_mapped(tmp_path, monkeypatch):
    """A mapped file that is cut short meanwhile, on a network disk for instance, ends a process."""
    opened, to_rgb = [], decoding.to_rgb
    monkeypatch.setattr(
        decoding, "to_rgb", lambda image, white: opened.append(image) or to_rgb(image, white)
    )
    for kind in ("TIFF", "PPM"):
        (tmp_path / "image").write_bytes(encoded(Image.fromarray(RAMP), kind))
        Decoding().decode(tmp_path / "image")
        assert opened[-1].map is None
        with Image.open(tmp_path / "image") as mapped:
            mapped.load()
            assert mapped.map is not None
