"""The whole driver on models that are folders of transformers."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_images import write_images
from small_transformers import image_features, transformers, write_folder

from tir_kernels.fewshot.classifier.folder import load_classifier
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.journal import JournalReader
from tir_kernels.towers.loading.models import load_model

pytestmark = pytest.mark.slow

COMMON = ["--device=cpu"]


@pytest.fixture(params=["clip", "siglip", "siglip2"])
def model(request, tmp_path):
    write_folder(tmp_path / "model", request.param)
    return tmp_path / "model"


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", {"red": 6, "light blue": 6, "green": 6})


def test_all_kinds_of_methods_run(model, images, tmp_path, capsys):
    arms = [
        "--method=zero-shot", "--arm=tokens=tir,layers=1", "--method=lora", "--steps=2",
        "--method=linear-probe",
        "--arm=attention=tir,layers=1,placement=attention", "--method=tip-adapter",
    ]  # fmt: skip
    options = ["--ways=3", "--shots=2", "--queries=3", "--episodes=2", "--track=every=1"]
    out = tmp_path / "out"
    arguments = ["--data", str(images), "--model", str(model), "--out", str(out)]
    assert main(["run", *arguments, *COMMON, *options, *arms]) == 0, capsys.readouterr().err
    records = JournalReader(out).news()
    assert len(records) == 2 * 6
    described = json.loads((out / "settings.json").read_text())["settings"]["model"]
    assert described == f"content {load_model(str(model)).fingerprint[:16]}"


def fitted(model, images, tmp_path, capsys, *options):
    out = tmp_path / "classifier"
    arguments = ["fit", "--data", str(images), "--model", str(model), "--out", str(out)]
    assert main([*arguments, *COMMON, *options]) == 0, capsys.readouterr().err
    return out


def probabilities(classifier, image):
    with classifier.open() as scorer:
        return scorer.logits(classifier.model.preprocess(image)[None])


@pytest.mark.parametrize(
    "options", [["--method=tir", "--layers=1", "--steps=2"], ["--method=lora", "--steps=2"]]
)
def test_exported_forms_compute_the_same(options, model, images, tmp_path, capsys, monkeypatch):
    folder = fitted(model, images, tmp_path, capsys, *options)
    image = Image.open(images / "red" / "000.png").convert("RGB")
    classifier = load_classifier(folder)
    expected = probabilities(classifier, image)
    forms = {form: tmp_path / form for form in ("merged", "transformers", "with-base")}
    given = [word for form, path in forms.items() for word in (f"--{form}", str(path))]
    assert main(["export", str(folder), *given]) == 0, capsys.readouterr().err

    model.rename(tmp_path / "away")
    torch.testing.assert_close(probabilities(load_classifier(forms["with-base"]), image), expected)

    (code,) = re.findall(
        r"```python\n(.*?)```", (forms["merged"] / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(forms["merged"])
    names: dict = {}
    exec(code, names)
    given = names["preprocess"](images=[image], return_tensors="pt")
    given = given if "spatial_shapes" in given else given["pixel_values"]
    torch.testing.assert_close(names["logits"](given), expected, rtol=1e-4, atol=1e-4)
    given_images = classifier.model.preprocess(image)[None]

    peft = pytest.importorskip("peft")
    base = transformers.AutoModel.from_pretrained(tmp_path / "away")
    adapted = peft.PeftModel.from_pretrained(base, forms["transformers"]).eval()
    merged = load_model(str(forms["merged"])).model
    with torch.no_grad():
        found = image_features(adapted, given_images)
        torch.testing.assert_close(
            found, image_features(merged, given_images), rtol=1e-4, atol=1e-4
        )


def test_predictions(model, images, tmp_path, capsys):
    folder = fitted(model, images, tmp_path, capsys, "--method=zero-shot")
    out = tmp_path / "predictions.csv"
    path = str(Path(images) / "red")
    assert main(["predict", str(folder), path, "--out", str(out)]) == 0, capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 1 + 6
