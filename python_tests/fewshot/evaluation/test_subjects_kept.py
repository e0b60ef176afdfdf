"""A classifier keeps how its images are read again: its column of subjects, what is white."""

import csv
import json
import shutil

import numpy as np
import pytest
from evaluations import Settings
from PIL import Image

from tir_kernels import fewshot
from tir_kernels.demo import model_directory
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.expected import held_out_parts
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.evaluation import temperature
from tir_kernels.fewshot.evaluation.evaluating import Evaluator
from tir_kernels.fewshot.evaluation.seen import support_of

DECODING = Decoding()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def listed(drawn, tmp_path_factory):
    """A table of the support with two patients a class, away from the images; its classifier."""
    folder = tmp_path_factory.mktemp("listed")
    table, out = folder / "list.csv", folder / "classifier"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label", "patient"))
        for part in sorted(drawn.support.iterdir()):
            for number, path in enumerate(sorted(part.iterdir())):
                name = path.relative_to(drawn.support)
                writer.writerow((name, part.name, f"{part.name}{number // 2}"))
    assert main([*fit_options(drawn, table, out), "--group-column=Patient"]) == 0
    return table, out


def fit_options(drawn, table, out):
    options = ["fit", "--data", str(table), "--images", str(drawn.support), "--device=cpu"]
    options += ["--model", str(model_directory()), "--method=linear-probe", "--no-cache"]
    return [*options, "--out", str(out)]


def test_the_column_is_in_the_folder_and_its_subjects_are_found_again(drawn, listed):
    table, out = listed
    classifier = fewshot.load_classifier(out)
    assert classifier.about.settings["group_column"] == "patient", "as the table writes it"
    assert classifier.about.figures["held_out_folds"] == 2
    assert classifier.about.figures["held_out_subjects"] == 8
    support = support_of(classifier, str(table), DECODING, images=str(drawn.support))
    assert len(set(support.groups)) == 8
    assert "group column: patient" in (out / "README.md").read_text()


def test_another_column_is_another_fit(drawn, listed, capsys):
    options = fit_options(drawn, *listed)
    assert main([*options, "--group-column=none"]) == 2
    assert "other settings: --group-column was patient, is none" in capsys.readouterr().err
    assert main([*options, "--group-column=patient"]) == 0
    assert "is finished, with these settings" in capsys.readouterr().out


def test_fit_takes_a_column_from_python(drawn, listed, tmp_path):
    shutil.copytree(drawn.support, tmp_path / "data")
    shutil.copy(listed[0], tmp_path / "data" / "list.csv")
    settings = fewshot.FitSettings(group_column="patient")
    with pytest.warns(UserWarning, match="12 images show 8 subjects by column patient"):
        made = fewshot.fit(
            tmp_path / "data" / "list.csv",
            str(model_directory()),
            method=fewshot.methods.ZeroShot(),
            settings=settings,
        )
    assert made.about.settings["group_column"] == "patient"
    assert made.about.figures["held_out_subjects"] == 8
    with pytest.raises(TypeError, match="group_column must be a str"):
        fewshot.FitSettings(group_column=3)


def test_a_temperature_is_fitted_with_subjects_together(drawn, listed, monkeypatch):
    table, out = listed
    seen = []

    def note(*given):
        for kept, held_out in held_out_parts(*given):
            seen.append((set(kept.groups), set(held_out.groups)))
            yield kept, held_out

    monkeypatch.setattr(temperature, "held_out_parts", note)
    evaluator = Evaluator(fewshot.load_classifier(out), Settings(bootstrap=20, temperature="fit"))
    found = evaluator.evaluate(
        str(drawn.test), support=str(table), support_images=str(drawn.support)
    )
    assert len(seen) == 2
    assert all(held_out and not kept & held_out for kept, held_out in seen)
    assert any("was fitted on the 12 images" in note for note in found.notes)
    assert any("group_column=patient takes that of a table" in note for note in found.notes)


def test_a_table_without_the_column_is_no_support(drawn, listed, tmp_path):
    table, out = listed
    (tmp_path / "list.csv").write_text(table.read_text().replace("patient", "room"))
    with pytest.raises(FewShotError, match="has no column 'patient'"):
        support_of(
            fewshot.load_classifier(out),
            str(tmp_path / "list.csv"),
            DECODING,
            images=str(drawn.support),
        )


def test_folders_from_before_there_was_a_column(listed, tmp_path):
    shutil.copytree(listed[1], tmp_path / "old")
    path = tmp_path / "old" / "classifier.json"
    content = json.loads(path.read_text())
    del content["settings"]["group_column"], content["white_value"]
    path.write_text(json.dumps(content))
    about = fewshot.load_classifier(tmp_path / "old").about
    assert "group_column" not in about.settings
    assert about.white_value is None


@pytest.mark.parametrize("white_value", [0, -1, "4095"])
def test_a_white_value_that_is_none(listed, tmp_path, white_value):
    shutil.copytree(listed[1], tmp_path / "bad")
    path = tmp_path / "bad" / "classifier.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "white_value": white_value}))
    with pytest.raises(FewShotError, match=r"classifier.json can't be used"):
        fewshot.load_classifier(tmp_path / "bad")


def test_images_of_more_bits_are_read_as_they_were_by_fit(tmp_path):
    """Twelve bits in files of sixteen: without what is white they would be nearly black."""
    random = np.random.default_rng(0)
    for label, most in (("dark", 1500), ("light", 4095)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, most, (32, 32)).astype(np.uint16)
            Image.fromarray(pixels).save(tmp_path / "data" / label / f"{number}.png")
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    options = ["fit", "--data", data, "--model", str(model_directory()), "--device=cpu"]
    options += ["--method=linear-probe", "--folds=0", "--no-cache", "--white-value=4095"]
    assert main([*options, "--out", out]) == 0
    classifier = fewshot.load_classifier(out)
    assert classifier.about.white_value == 4095
    found = Evaluator(classifier, Settings(bootstrap=0)).evaluate(data, support=data)
    assert found.of_support == 6
    paths = sorted((tmp_path / "data").rglob("*.png"))
    own = classifier.predict(paths).max(1).values.tolist()
    assert [each.probability for each in found.predictions] == pytest.approx(own, rel=1e-4)
    other = Evaluator(classifier, Settings(bootstrap=0, white_value=65535)).evaluate(data)
    assert other.of_support == 0
