"""Augmented views: what is drawn, what is made of it, and that a run's views never change."""

import json

import fake_engine
import numpy as np
import pytest
import torch
from fake_engine import small_preprocess
from torchvision.transforms import v2

from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.views import View, apply_view, draw_views, with_views
from tir_kernels.fewshot.episode import plan_episode


def pixels_of(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_drawn_views_never_change():
    # These numbers are a promise: a run made with an older version is continued with a newer one.
    first, second = draw_views(np.random.RandomState(0), 2, 224, 224)
    assert first.box == (3, 3, 161, 182)
    assert not first.is_flipped
    factors = (first.brightness, first.contrast, first.saturation)
    assert factors == (1.0988509574287777, 0.9075053658341599, 0.8380276852355778)
    assert second.box == (39, 87, 87, 76)


def test_drawn_views_stay_within_their_bounds():
    views = draw_views(np.random.RandomState(1), 2000, 90, 90)
    shares, flips = [], 0
    for view in views:
        top, left, height, width = view.box
        assert 0 <= top <= top + height <= 90
        assert 0 <= left <= left + width <= 90
        assert min(height, width) > 0
        shares.append(height * width / 90**2)
        flips += view.is_flipped
        for factor in (view.brightness, view.contrast, view.saturation):
            assert 0.6 <= factor <= 1.4
    assert min(shares) >= 0.07  # a pixel more or less counts at this size
    assert max(shares) > 0.9
    assert 0.3 < np.mean(shares) < 0.6
    assert 900 < flips < 1100


def test_a_view_that_changes_nothing_is_the_image():
    pixels = pixels_of(3, 12, 20)
    same = View((0, 0, 12, 20), False, 1.0, 1.0, 1.0)
    assert torch.equal(apply_view(pixels, same), pixels)
    flipped = View((0, 0, 12, 20), True, 1.0, 1.0, 1.0)
    assert torch.equal(apply_view(pixels, flipped), pixels.flip(-1))


def test_a_view_is_what_pillow_makes_of_it():
    smooth = torch.nn.functional.interpolate(
        pixels_of(1, 3, 6, 6).float(), (48, 48), mode="bilinear"
    )[0]
    pixels = smooth.round().to(torch.uint8)
    view = View((5, 9, 30, 24), True, 0.8, 1.3, 0.7)
    image = v2.functional.to_pil_image(pixels)
    image = v2.functional.resized_crop(image, *view.box, [48, 48], v2.InterpolationMode.BICUBIC)
    image = v2.functional.horizontal_flip(image)
    image = v2.functional.adjust_brightness(image, 0.8)
    image = v2.functional.adjust_contrast(image, 1.3)
    image = v2.functional.adjust_saturation(image, 0.7)
    expected = v2.functional.pil_to_tensor(image)
    difference = (apply_view(pixels, view).int() - expected.int()).abs()
    assert difference.max() <= 4  # Pillow cuts off after each of the steps
    assert difference.float().mean() < 1.5


def test_views_follow_their_image():
    pixels = pixels_of(3, 3, 16, 16)
    together = with_views(pixels, 2, np.random.RandomState(5))
    assert together.shape == (9, 3, 16, 16)
    assert torch.equal(together[::3], pixels)
    views = draw_views(np.random.RandomState(5), 6, 16, 16)
    assert torch.equal(together[4], apply_view(pixels[1], views[2]))
    assert len(torch.unique(together.flatten(1), dim=0)) == 9


@pytest.mark.gpu
def test_views_on_a_gpu_are_the_same():
    pixels = pixels_of(4, 3, 64, 64)
    ours = with_views(pixels.cuda(), 3, np.random.RandomState(0)).cpu().int()
    difference = (ours - with_views(pixels, 3, np.random.RandomState(0)).int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_augmented_episodes(make_images):
    data = load_data(make_images())
    reader = ImageReader(data, small_preprocess)
    plan = plan_episode(0, 1, [8] * 6, 3)

    def load(**options):
        return load_episode(plan, data, reader, shots=2, queries=4, **options)

    plain, augmented = load(), load(augment=4)
    assert augmented.support_images.shape == (30, 3, 8, 8)
    assert augmented.support_images.dtype == torch.float32
    assert torch.equal(augmented.support_images[::5], plain.support_images)
    assert augmented.support_labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert torch.equal(augmented.query_images, plain.query_images)
    assert torch.equal(load(augment=4).support_images, augmented.support_images)
    assert not torch.equal(load(augment=4, seed=1).support_images, augmented.support_images)


def test_the_command_line_augments(make_images, tmp_path, capsys, monkeypatch):
    shapes, fake_finetune = [], fake_engine.fake_finetune

    def spy(*positional, **options):
        shapes.append(tuple(positional[0].support_images.shape))
        return fake_finetune(*positional, **options)

    monkeypatch.setattr(fake_engine, "fake_finetune", spy)
    arguments = ["run", "--data", str(make_images()), "--model", "fake", "--method", "lora"]
    arguments += ["--ways=3", "--shots=2", "--queries=2", "--episodes=2", "--backend=reference"]
    arguments += ["--steps=1", "--out", str(tmp_path / "out")]
    assert fake_engine.run_main([*arguments, "--augment=4"]) == 0
    assert shapes == [(30, 3, 8, 8)] * 2
    assert fake_engine.run_main([*arguments, "--augment=4"]) == 0
    capsys.readouterr()
    assert fake_engine.run_main(arguments) == 2
    assert "--augment was 4, is unset;" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "plain")
    assert fake_engine.run_main(arguments) == 0
    # As a run from before there was augmentation: no word on it.
    settings = json.loads((tmp_path / "plain" / "settings.json").read_text())["settings"]
    assert "augment" not in settings
    assert fake_engine.run_main([*arguments, "--augment=0"]) == 0
