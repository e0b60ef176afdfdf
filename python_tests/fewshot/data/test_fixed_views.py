"""The five fixed kinds of views: what is drawn, that they are the published program's pixels, and
that runs and fits train on them.
"""

import json

import fake_engine
import numpy as np
import pytest
import torch
from fake_engine import fake_model, small_preprocess
from PIL import Image, ImageEnhance, ImageOps

from tir_kernels.fewshot import FitSettings, Protocol, Runtime
from tir_kernels.fewshot.classifier.about import BaseModel
from tir_kernels.fewshot.classifier.fitting import Fitter, read_support
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.fixed_views import FixedView, draw_fixed_views, fixed_view
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.views import views_per_image, with_views
from tir_kernels.fewshot.episode import plan_episode
from tir_kernels.fewshot.methods.zero_shot import ZeroShot


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def published(pixels, view):
    """The steps of the published program's transforms, as its libraries carry them out."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if view.angle:
        image = image.rotate(view.angle, Image.Resampling.NEAREST)
    if view.factors:
        kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
        for kind, factor in zip(kinds, view.factors, strict=True):
            image = kind(image).enhance(factor)
    if view.is_flipped:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def test_drawn_views_never_change():
    # These numbers are a promise: a run made with an older version is continued with a newer one.
    every, turned, jittered, flipped = draw_fixed_views(np.random.RandomState(0))
    factors = (1.1721514930979355, 1.082210700857315, 1.0359065463975174)
    assert every == FixedView(4.393215353459226, factors, True)
    assert turned == FixedView(13.13047017599905)
    assert jittered == FixedView(
        factors=(0.9500697690101539, 1.3134184006256637, 1.3709302084008232)
    )
    assert flipped == FixedView(is_flipped=True)


def test_drawn_views_stay_within_their_bounds():
    random = np.random.RandomState(1)
    drawn = [draw_fixed_views(random) for _ in range(1000)]
    angles = np.array([view.angle for views in drawn for view in views[:2]])
    assert -45 <= angles.min() < -43
    assert 43 < angles.max() <= 45
    factors = np.array([view.factors for views in drawn for view in (views[0], views[2])])
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    for place in (0, 3):
        assert 430 < sum(views[place].is_flipped for views in drawn) < 570


def test_a_view_has_the_published_pixels():
    pixels = noise(3, 30, 30)
    views = [each for seed in range(4) for each in draw_fixed_views(np.random.RandomState(seed))]
    for view in (*views, FixedView()):
        assert torch.equal(fixed_view(pixels, view), published(pixels, view))
    assert torch.equal(fixed_view(pixels, FixedView()), pixels)
    # The corners come from outside of the image.
    assert fixed_view(pixels, FixedView(45.0))[:, 0, 0].tolist() == [0, 0, 0]


def test_an_image_is_the_first_of_its_five_views():
    pixels = noise(3, 3, 16, 16)
    together = with_views(pixels, "five", np.random.RandomState(5))
    assert together.shape == (3 * views_per_image("five"), 3, 16, 16) == (15, 3, 16, 16)
    assert torch.equal(together[::5], pixels)
    random = np.random.RandomState(5)
    for image, views in zip(pixels, together.unflatten(0, (3, 5)), strict=True):
        for view, drawn in zip(views[1:], draw_fixed_views(random), strict=True):
            assert torch.equal(view, published(image, drawn))


def test_episodes_of_five_views(make_images):
    data = load_data(make_images())
    reader = ImageReader(data, small_preprocess)
    plan = plan_episode(0, 1, [8] * 6, 3)

    def load(**options):
        return load_episode(plan, data, reader, shots=2, queries=4, **options)

    plain, five = load(), load(augment="five")
    assert five.views == 5
    assert five.images_per_class == 2
    assert torch.equal(five.support_images[::5], plain.support_images)
    assert five.support_labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert torch.equal(five.query_images, plain.query_images)
    assert torch.equal(load(augment="five").support_images, five.support_images)
    assert not torch.equal(load(augment="five", seed=1).support_images, five.support_images)


def test_a_fit_trains_on_five_views(make_images):
    data = load_data(make_images({"a": 2, "b": 3}))
    model = fake_model()
    support = read_support(data, ImageReader(data, model.preprocess), None, 0)
    base, method = BaseModel.of("fake", None, model), ZeroShot()
    settings = FitSettings(augment="five")
    episode = Fitter(model, base, method, settings, Runtime()).episode(support)
    assert episode.views == 5
    assert len(episode.support_images) == len(episode.support_labels) == 25
    assert torch.equal(episode.support_images[::5], model.preprocess.normalise(support.pixels))
    episode.check()


def test_the_command_line_takes_five(make_images, tmp_path, capsys, monkeypatch):
    views, fake_finetune = [], fake_engine.fake_finetune

    def spy(*positional, **options):
        views.append(positional[0].views)
        return fake_finetune(*positional, **options)

    monkeypatch.setattr(fake_engine, "fake_finetune", spy)
    arguments = ["run", "--data", str(make_images()), "--model", "fake", "--method", "lora"]
    arguments += ["--ways=3", "--shots=2", "--queries=2", "--episodes=2", "--backend=reference"]
    arguments += ["--steps=1", "--out", str(tmp_path / "out")]
    assert fake_engine.run_main([*arguments, "--augment=five"]) == 0
    assert views == [5, 5]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["augment"] == "five"
    assert fake_engine.run_main([*arguments, "--augment=five"]) == 0
    capsys.readouterr()
    # As many views, of other kinds.
    assert fake_engine.run_main([*arguments, "--augment=4"]) == 2
    assert "--augment was five, is 4;" in capsys.readouterr().err
    assert fake_engine.run_main([*arguments, "--augment=six"]) == 2
    assert "'six' is neither a whole number nor five" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [Protocol, FitSettings])
@pytest.mark.parametrize("value", ["six", "Five", "4", 1.0, True, None])
def test_nothing_else_is_taken(settings, value):
    with pytest.raises(TypeError, match="augment must be an int or 'five'; got"):
        settings(augment=value)
