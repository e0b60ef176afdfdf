"""The setting ``resize``: what it makes of images, and that all who read them know of it."""

import json

import fake_engine
import numpy as np
import pytest
import torch
from command_line import assert_refused
from fake_engine import fake_model
from open_clip.transform import PreprocessCfg
from PIL import Image

from tir_kernels import fewshot
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.evaluation.evaluating import Evaluator
from tir_kernels.fewshot.evaluation.settings import EvaluateSettings
from tir_kernels.fewshot.resizing import with_resize
from tir_kernels.fewshot.settings import RESIZES
from tir_kernels.towers.loading.models import load_model
from tir_kernels.towers.loading.preprocess import Preprocess
from tir_kernels.towers.loading.saving import save_model

WIDE = (60, 40)


def noise(seed, width, height):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def bits(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.fixture
def wide_images(make_images):
    """Images of two classes, whose left third alone tells them apart: a crop cuts it off."""
    root = make_images({"a": 4, "b": 4})
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        image = noise(number, *WIDE)
        image.paste((250, 250, 250) if path.parent.name == "a" else (5, 5, 5), (0, 0, 10, 40))
        image.save(path)
    return root


def test_pixels_of_each_resize():
    image, own = noise(0, *WIDE), Preprocess(PreprocessCfg(size=20))
    squashed, bilinear = own.with_resize(True), own.with_resize(True, "bilinear")
    kinds = Image.Resampling
    assert torch.equal(squashed.to_pixels(image), bits(image.resize((20, 20), kinds.BICUBIC)))
    assert torch.equal(bilinear.to_pixels(image), bits(image.resize((20, 20), kinds.BILINEAR)))
    cropped = image.resize((30, 20), kinds.BICUBIC).crop((5, 0, 25, 20))
    assert torch.equal(squashed.with_resize(False).to_pixels(image), bits(cropped))
    pixels = squashed.to_pixels(image)
    assert torch.equal(squashed.normalise(pixels), own.normalise(pixels))
    oblong = Preprocess(PreprocessCfg(size=(20, 30))).with_resize(True)
    assert torch.equal(oblong.to_pixels(image), bits(image.resize((30, 20), kinds.BICUBIC)))


def test_words_of_the_setting():
    def config(resize, **own):
        model = fake_model()
        object.__setattr__(model, "preprocess", Preprocess(PreprocessCfg(size=8, **own)))
        found = with_resize(model, resize)
        return found.preprocess.config.resize_mode, found.preprocess.config.interpolation

    assert config(None) == config("crop") == ("shortest", "bicubic")
    assert config("squash") == ("squash", "bicubic")
    assert config("squash-bilinear") == ("squash", "bilinear")
    assert config("squash", interpolation="bilinear") == ("squash", "bilinear")
    assert config("crop", resize_mode="squash") == ("shortest", "bicubic")
    for settings in (fewshot.Protocol, fewshot.FitSettings):
        assert [settings(resize=each).resize for each in RESIZES] == list(RESIZES)
        with pytest.raises(ValueError, match="resize must be one of crop, squash, squash-bil"):
            settings(resize="squeeze")


def test_a_run_is_of_its_resize(wide_images, tmp_path, capsys, monkeypatch):
    images, fake_finetune = {}, fake_engine.fake_finetune

    def spy(*positional, **options):
        images[place] = positional[0].support_images
        return fake_finetune(*positional, **options)

    monkeypatch.setattr(fake_engine, "fake_finetune", spy)
    arguments = ["run", "--data", str(wide_images), "--model", "fake", "--method", "zero-shot"]
    arguments += ["--ways=2", "--shots=1", "--queries=2", "--episodes=1", "--backend=reference"]
    for place, options in {
        "own": [],
        "crop": ["--resize=crop"],
        "same": ["--resize=squash"],
    }.items():
        out = [*options, "--out", str(tmp_path / place)]
        assert fake_engine.run_main([*arguments, *out]) == 0
        settings = json.loads((tmp_path / place / "settings.json").read_text())["settings"]
        assert settings.get("resize") == (options[0].partition("=")[2] if options else None)
    assert torch.equal(images["own"], images["same"])  # the stand-in's own is squash, bicubic
    assert not torch.equal(images["own"], images["crop"])
    capsys.readouterr()
    assert fake_engine.run_main([*arguments, "--out", str(tmp_path / "crop")]) == 2
    assert "--resize was crop, is unset;" in capsys.readouterr().err
    assert_refused(capsys, [*arguments, "--resize=squeeze", "--out", "x"], "squeeze")


def test_raw_words_are_a_setting_of_the_run(make_images, tmp_path, capsys):
    root = make_images({"SeaLake": 4, "River": 4})
    arguments = ["run", "--data", str(root), "--model", "fake", "--method", "zero-shot"]
    arguments += ["--ways=2", "--shots=1", "--queries=2", "--episodes=1", "--backend=reference"]
    arguments += ["--out", str(tmp_path / "out")]
    assert fake_engine.run_main([*arguments, "--class-names=raw"]) == 0
    assert "class names are raw: River is 'River', SeaLake is 'SeaLake'" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["class_names"] == "raw"
    assert fake_engine.run_main(arguments) == 2
    assert "--class-names was raw, is unset" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_is_saved_with_its_resize(tiny_model_folder, tmp_path):
    loaded = with_resize(load_model(str(tiny_model_folder)), "crop")
    save_model(loaded, tmp_path / "copy")
    again = load_model(str(tmp_path / "copy"))
    assert again.preprocess.version == loaded.preprocess.version
    assert again.preprocess.config.resize_mode == "shortest"


@pytest.mark.slow
def test_a_classifier_keeps_its_resize(wide_images, tiny_model_folder, tmp_path):
    out = str(tmp_path / "out")
    options = ["fit", "--data", str(wide_images), "--model", str(tiny_model_folder)]
    options += ["--method=linear-probe", "--folds=0", "--device=cpu"]
    assert main([*options, "--resize=crop", "--out", out]) == 0
    assert main([*options, "--out", str(tmp_path / "own")]) == 0
    assert main([*options, "--out", out]) == 2
    classifier = fewshot.load_classifier(out)
    assert classifier.about.resize == classifier.about.settings["resize"] == "crop"
    assert classifier.model.preprocess.config.resize_mode == "shortest"
    assert "- resize: crop" in (tmp_path / "out" / "README.md").read_text()
    found = Evaluator(classifier, EvaluateSettings(bootstrap=0)).evaluate(str(wide_images))
    assert found.of_support == 8  # known by pixels, which are those of the fit
    paths = sorted(wide_images.rglob("*.png"))
    own = classifier.predict(paths)
    likely = [each.probability for each in found.predictions]
    assert likely == pytest.approx(own.max(1).values.tolist(), rel=1e-4)
    table = tmp_path / "rows.csv"
    assert main(["predict", out, str(wide_images), "--out", str(table), "--device=cpu"]) == 0
    assert len(table.read_text().splitlines()) == 9
    cropping = load_model(str(tiny_model_folder)).preprocess.with_resize(False)
    cropped = torch.stack([cropping(Image.open(path)) for path in paths])
    assert torch.equal(classifier.predict(cropped), own)
    other = fewshot.load_classifier(tmp_path / "own")
    assert other.about.resize is None
    assert "resize" not in other.about.settings
    assert not torch.allclose(other.predict(paths), own, atol=1e-3)
    about = tmp_path / "out" / "classifier.json"
    content = json.loads(about.read_text())
    content["settings"]["resize"] = "squeeze"
    about.write_text(json.dumps(content))
    with pytest.raises(FewShotError, match=r"classifier.json can't be used: resize is 'squeeze'"):
        fewshot.load_classifier(out)


@pytest.mark.slow
def test_fewshot_fit_takes_it(wide_images, tiny_model_folder):
    settings = fewshot.FitSettings(resize="crop", folds=0, augment="five")
    method = fewshot.methods.TipAdapter()
    made = fewshot.fit(wide_images, str(tiny_model_folder), method=method, settings=settings)
    assert made.about.views == 5
    assert made.about.resize == "crop"
    assert made.model.preprocess.config.resize_mode == "shortest"
    assert made.learned["keys"].shape[0] == 8  # a key is a mean over an image's views
