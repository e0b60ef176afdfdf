"""The two halves of the preprocessing give together what open_clip's own transform gives."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from tir_kernels.towers.loading.preprocess import Preprocess

CONFIGS = [
    PreprocessCfg(size=32),
    PreprocessCfg(size=(24, 40), resize_mode="shortest"),
    PreprocessCfg(size=32, resize_mode="longest", fill_color=128, interpolation="bilinear"),
    PreprocessCfg(size=(24, 40), resize_mode="longest", fill_color=7),
    PreprocessCfg(size=(40, 24), resize_mode="squash", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
]


def noise(seed, width, height):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config.resize_mode}-{config.size}"
)
@pytest.mark.parametrize("size", [(90, 50), (20, 77), (32, 32), (5, 5)])
def test_same_bits_as_the_whole_transform(config, size):
    image = noise(sum(size), *size)
    ours = Preprocess(config)
    expected = image_transform_v2(config, is_train=False)(image)
    pixels = ours.to_pixels(image)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == ours.shape == expected.shape
    assert torch.equal(ours.normalise(pixels), expected)
    assert torch.equal(ours(image), expected)
    assert torch.equal(ours.normalise(torch.stack([pixels, pixels]))[1], expected)


@pytest.mark.gpu
def test_same_bits_on_a_gpu():
    ours = Preprocess(PreprocessCfg())
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(ours.normalise(pixels.cuda()).cpu(), ours.normalise(pixels))


def test_pixels_are_left_as_they_are():
    ours = Preprocess(PreprocessCfg(size=16))
    pixels = ours.to_pixels(noise(0, 20, 30))
    before = pixels.clone()
    ours.normalise(pixels)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.resize_mode)
@pytest.mark.parametrize("size", [(1, 1001), (200_000, 2)])
def test_a_strip_is_refused_before_it_fills_the_memory(config, size):
    with pytest.raises(ValueError, match=rf"a strip of {size[0]} x {size[1]} pixels"):
        Preprocess(config).to_pixels(Image.new("RGB", size))
    assert Preprocess(PreprocessCfg(size=4)).to_pixels(Image.new("RGB", (1, 1000))).shape[0] == 3


def test_every_setting_is_part_of_the_version():
    changes = {
        "size": 16,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.1, 0.2, 0.3),
        "interpolation": "bilinear",
        "resize_mode": "squash",
        "fill_color": 3,
    }
    versions = {Preprocess(PreprocessCfg(**{key: value})).version for key, value in changes.items()}
    assert len(versions | {Preprocess(PreprocessCfg()).version}) == len(changes) + 1
    assert Preprocess(PreprocessCfg()).version == Preprocess(PreprocessCfg()).version
