"""A classifier is made from labelled images, asked about others, saved, and read again."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tir_kernels import fewshot
from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.folder import ABOUT_FILE, LEARNED_FILE
from tir_kernels.towers import products

SETTINGS = fewshot.FitSettings(shots=2, folds=2)
METHODS = {
    "tir": fewshot.methods.TIR(steps=2, lora_lr=1e-3),
    "tir by centroids": fewshot.methods.TIR(steps=2, lora_lr=1e-3, relevance="centroids"),
    "tir at random": fewshot.methods.TIR(steps=2, selection="random", placement="both"),
    "lora": fewshot.methods.LoRA(steps=2, lora_lr=1e-3, context_tokens=6),
    "zero-shot": fewshot.methods.ZeroShot(),
    "linear-probe": fewshot.methods.LinearProbe(),
    "tip-adapter": fewshot.methods.TipAdapter(),
    "zs-lp": fewshot.methods.ZSLP(steps=2),
    "lp++": fewshot.methods.LPPlusPlus(steps=12),
    "prolip": fewshot.methods.ProLIP(steps=2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of the drawn domain, of unequal size."""
    folder = tmp_path_factory.mktemp("drawn")
    write_image_folder(folder / "all")
    kept = folder / "some"
    for number, name in enumerate(sorted(p.name for p in (folder / "all").iterdir() if p.is_dir())):
        if number == 3:
            break
        (kept / name).mkdir(parents=True)
        for path in sorted((folder / "all" / name).iterdir())[: 4 + number]:
            shutil.copy(path, kept / name)
    return kept


@pytest.fixture(scope="module")
def paths(data):
    return sorted(data.rglob("*.*"))


def fit(data, method=METHODS["zero-shot"], settings=SETTINGS, **more):
    return fewshot.fit(data, str(model_directory()), method=method, settings=settings, **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_saved_and_read_again_it_answers_the_same(name, data, paths, tmp_path):
    made = fit(data, METHODS[name])
    expected = made.predict(paths)
    assert expected.shape == (len(paths), 3)
    torch.testing.assert_close(expected.sum(1), torch.ones(len(paths)))
    made.save(tmp_path / "classifier")
    read = fewshot.load_classifier(tmp_path / "classifier")
    assert read.about == made.about
    assert read.labels == tuple(sorted(p.name for p in data.iterdir()))
    assert torch.equal(read.predict(paths), expected)
    assert (tmp_path / "classifier" / "README.md").read_text().startswith("---\n")
    weights = {path.suffix for path in (tmp_path / "classifier").iterdir()}
    assert weights == {".json", ".md", ".safetensors"}, "no base weights, and nothing pickled"


@pytest.fixture(scope="module")
def made(data):
    return fit(data, METHODS["tir"], fewshot.FitSettings(folds=0))


def test_an_answer_depends_on_no_other_image(made, paths):
    together = made.predict(paths)
    alone = torch.cat([made.predict([path], batch_size=1) for path in paths])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.predict(paths[::-1], batch_size=5).flip(0), together)


def test_images_of_every_kind(made, paths):
    expected = made.predict(paths[:3])
    images = [Image.open(path).convert("RGB") for path in paths[:3]]
    assert torch.equal(made.predict(images), expected)
    pixels = torch.stack([made.model.preprocess.to_pixels(image) for image in images])
    assert torch.equal(made.predict(made.model.preprocess.normalise(pixels)), expected)
    assert torch.equal(made.predict([str(path) for path in paths[:3]]), expected)
    assert made.predict([]).shape == (0, 3)
    grey = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
    assert made.predict([grey, images[0].convert("LA"), images[0].convert("P")]).isfinite().all()


def test_what_is_no_list_of_images_is_refused(made, paths, tmp_path):
    with pytest.raises(TypeError, match=r"pass \[image\]"):
        made.predict(str(paths[0]))
    with pytest.raises(TypeError, match="got int"):
        made.predict([3])
    with pytest.raises(ValueError, match="must have shape"):
        made.predict(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="batch_size"):
        made.predict([], batch_size=0)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(FewShotError, match=r"can't read the image .*a\.png"):
        made.predict([tmp_path / "a.png"])


def test_the_model_is_left_as_it_was(made, paths):
    before = {name: value.clone() for name, value in made.model.model.state_dict().items()}
    images = torch.randn(2, *made.model.preprocess.shape)
    plain = made.model.model.encode_image(images)
    made.predict(paths[:2])
    after = made.model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(made.model.model.encode_image(images), plain)


def test_figures_say_what_to_expect(data):
    figures = fit(data, METHODS["linear-probe"], fewshot.FitSettings(folds=3)).about.figures
    assert figures["held_out_folds"] == 3
    assert figures["held_out_images"] == 4 + 5 + 6
    assert 0 <= figures["held_out_low"] <= figures["held_out_accuracy"]
    assert figures["held_out_accuracy"] <= figures["held_out_high"] <= 1
    assert figures["support_accuracy"] == 1
    assert 0 <= figures["zero_shot_accuracy"] <= 1


def test_one_image_of_a_class_gives_no_estimate(data, tmp_path):
    shutil.copytree(data, tmp_path / "few")
    for path in sorted(sorted((tmp_path / "few").iterdir())[0].iterdir())[1:]:
        path.unlink()
    figures = fit(tmp_path / "few", METHODS["tip-adapter"], fewshot.FitSettings()).about.figures
    assert not any(name.startswith("held_out") for name in figures)


@pytest.fixture
def saved(made, tmp_path):
    made.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("name", [LEARNED_FILE, "adapter_model.safetensors", "adapter_config.json"])
def test_missing_and_changed_files_are_refused(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-3] + b"abc")
    with pytest.raises(FewShotError, match=f"damaged: {name} is not as it was written"):
        fewshot.load_classifier(saved)
    (saved / name).unlink()
    with pytest.raises(FewShotError, match=f"damaged: {name} is missing"):
        fewshot.load_classifier(saved)


def test_no_classifier_is_refused(saved, tmp_path):
    with pytest.raises(FewShotError, match="does not exist"):
        fewshot.load_classifier(tmp_path / "nothing")
    about = json.loads((saved / ABOUT_FILE).read_text())
    for changes, words in (
        ({"format": 2}, "format 2"),
        ({"method": {"name": "magic"}}, "magic"),
        ({"method": {**about["method"], "steps": "many"}}, "steps"),
        ({"temperature": 0}, "temperature"),
        ({"files": {"../x": "0"}}, "no file of it"),
        ({"classes": 3}, "can't be used"),
    ):
        (saved / ABOUT_FILE).write_text(json.dumps(about | changes))
        with pytest.raises(FewShotError, match=words):
            fewshot.load_classifier(saved)
    (saved / ABOUT_FILE).unlink()
    with pytest.raises(FewShotError, match="fit is not finished"):
        fewshot.load_classifier(saved)


def test_another_base_model_is_refused(saved, made):
    about = json.loads((saved / ABOUT_FILE).read_text())
    about["base"]["fingerprint"] = "0123456789abcdef" * 4
    (saved / ABOUT_FILE).write_text(json.dumps(about))
    with pytest.raises(FewShotError, match=f"0123456789abcdef.*{made.model.fingerprint[:16]}"):
        fewshot.load_classifier(saved)


def test_other_things_are_not_mixed_with(made, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FewShotError, match=r"holds other things \(thesis\.txt\)"):
        made.save(tmp_path)


def test_too_few_images_or_classes(data, tmp_path):
    with pytest.raises(FewShotError, match="has 4 readable images but 5 are needed"):
        fit(data, settings=fewshot.FitSettings(shots=5))
    shutil.copytree(sorted(data.iterdir())[0], tmp_path / "one" / "class")
    with pytest.raises(FewShotError, match="2 classes or more"):
        fit(tmp_path / "one")


@pytest.mark.slow
def test_it_classifies_with_packed_matrices(data, paths, packed_shapes, monkeypatch):
    """Of the image tower alone, in one form; and says the same as without."""
    monkeypatch.setattr(products, "is_faster", lambda dtype: False)
    classifier = fit(data, METHODS["lora"])
    expected = classifier.predict(paths)
    assert not packed_shapes
    monkeypatch.setattr(products, "is_faster", lambda dtype: dtype == torch.float32)
    found = classifier.predict(paths, batch_size=3)
    blocks = len(classifier.model.model.visual.transformer.resblocks)
    # The last block projects queries by themselves.
    assert 4 * blocks <= len(packed_shapes) <= 5 * blocks
    torch.testing.assert_close(found, expected)
    assert not products._matrices
