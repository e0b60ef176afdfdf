"""Images of unusual kinds in a run of the command line: converted and told, or refused."""

import numpy as np
import pytest
from fake_engine import run_main
from image_files import encoded, tiff
from PIL import Image

HIGHEST = {"16 bits": 65535, "12 bits": 4095}


@pytest.fixture
def run(make_images, tmp_path, capfd):
    """Runs two episodes that need all images of three classes, some of which are given."""
    root = make_images({name: 4 for name in ("bright", "middle", "dark")})

    def start(images, *options, out="run"):
        for name, content in images.items():
            (root / name).with_suffix(".png").unlink(missing_ok=True)
            (root / name).write_bytes(content)
        arguments = ["run", "--data", str(root), "--model", "fake", "--method", "lora", "--steps=1"]
        arguments += ["--ways=3", "--shots=2", "--queries=2", "--episodes=2"]
        status = run_main(
            [*arguments, "--backend=reference", "--out", str(tmp_path / out), *options]
        )
        return status, capfd.readouterr().err

    return start


def pgm(level, highest):
    values = np.full((24, 24), level * highest, ">u2")
    return b"P5 24 24 65535\n" + values.tobytes()


def of_three_levels(highest):
    """Images of 16 bits whose classes differ in brightness alone."""
    levels = {"bright": 0.9, "middle": 0.5, "dark": 0.1}
    return {
        f"{name}/{number:03d}.pgm": pgm(level, highest)
        for name, level in levels.items()
        for number in range(4)
    }


def test_classes_of_16_bits_that_differ_in_brightness_are_told_apart(run):
    """Clipped at 255, all of them would be white."""
    status, text = run(of_three_levels(65535))
    assert status == 0
    assert text.count(".pgm has more than 8 bits per value, of which the upper 8 are kept") == 1
    assert "100.0 %" in text


def test_classes_of_12_bits_in_files_of_16_are_told_apart_once_white_is_given(run):
    images = of_three_levels(4095)
    status, text = run(images)
    assert status == 0
    assert text.count("pass --white-value 4095 (grey images), or convert them to 8 bits") == 1
    status, text = run(images, "--white-value", "4095", out="white")
    assert status == 0
    assert text.count(".pgm is converted to 8 bits with --white-value as white") == 1
    assert "100.0 %" in text
    # Numbers of another conversion are numbers of another run.
    status, text = run(images, "--white-value", "3000", out="white")
    assert status == 2
    assert "white-value" in text.replace("white_value", "white-value")


@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf"])
def test_impossible_white_values(run, value):
    status, text = run({}, "--white-value", value)
    assert status == 2
    assert "error: --white-value must be above 0" in text


REFUSED = {
    "multispectral": ("t.tif", tiff(np.ones((2, 2, 13), np.uint16)), "write its red, green and"),
    "drawing": ("t.png", encoded(Image.new("RGB", (9, 9)), "EPS"), "an EPS or PostScript drawing"),
    "limit": ("t.png", encoded(Image.new("RGB", (40, 40))), "1600 pixels, more than 1000; make it"),
    "strip": ("t.png", encoded(Image.new("RGB", (1, 999_999))), "a strip of 1 x 999999 pixels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_named_and_may_be_skipped(run, kind):
    name, content, reason = REFUSED[kind]
    images = {f"bright/{name}": content}
    options = ["--max-pixels", "1000"] if kind == "limit" else []
    # Four of five images an episode: this seed draws the one in question.
    status, text = run(images, *options, "--seed=3", "--episodes=8")
    assert status == 2
    assert "can't read the image" in text
    assert f"bright/{name}: " in text
    assert reason in text
    assert "Traceback" not in text
    assert "More samples per pixel" not in text
    status, text = run(images, *options, "--seed=3", "--episodes=8", "--skip-unreadable", out="two")
    assert status == 0
