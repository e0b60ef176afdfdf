"""A classifier is evaluated on labelled images: from Python and from the command line."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from command_line import assert_refused
from evaluations import QUICK, Settings, evaluate

from tir_kernels import fewshot
from tir_kernels.demo import model_directory
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.classifier import Scorer
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.evaluation.evaluating import Evaluator

pytestmark = pytest.mark.slow


def test_numbers_are_those_of_the_classifier_s_own_answers(drawn):
    with pytest.warns(UserWarning, match="4 of the 24 images are among those"):
        found = fewshot.evaluate(drawn.folder, drawn.test, settings=QUICK)
    paths = sorted(drawn.test.rglob("*.png"))
    probabilities = drawn.classifier.predict(paths)
    targets = [found.labels.index(path.parent.name) for path in paths]
    right = probabilities.argmax(1) == torch.tensor(targets)
    assert found.images == len(paths) == 24
    assert found.accuracy.value == pytest.approx(right.float().mean().item())
    assert found.accuracy.low <= found.accuracy.value <= found.accuracy.high
    own = probabilities[torch.arange(24), targets]
    assert found.scores["log_loss"].value == pytest.approx(-own.log().mean().item(), rel=1e-4)
    assert [each.image for each in found.predictions] == [
        str(path.relative_to(drawn.test)) for path in paths
    ]
    assert np.array(found.confusion).sum() == 24
    assert found.temperature == 1.0


def test_temperature_changes_probabilities_and_no_answer(drawn):
    plain, _ = evaluate(drawn)
    cold, _ = evaluate(drawn, settings=Settings(bootstrap=0, temperature=0.1))
    assert cold.temperature == 0.1
    assert cold.accuracy.value == plain.accuracy.value
    assert cold.accuracy.low is None
    assert cold.scores["log_loss"].value != pytest.approx(plain.scores["log_loss"].value)
    assert min(each.probability for each in cold.predictions) > min(
        each.probability for each in plain.predictions
    )


def test_its_own_images_are_noticed_wherever_their_copies_lie(drawn, test_copy):
    for path in test_copy.rglob("*.png"):
        path.rename(path.with_name(f"copy of {path.name}"))
    found, told = evaluate(drawn, test_copy, support=str(drawn.support))
    assert found.of_support == 4
    assert "4 of the 24 images are among those that the classifier was made from" in told
    left, told = evaluate(
        drawn,
        test_copy,
        Settings(bootstrap=20, exclude_support=True),
        support=str(drawn.support),
    )
    assert left.images == 20
    assert "left out: 4 images that the classifier was made from" in told
    with pytest.raises(FewShotError, match=r"no image of .* is left to evaluate: 12 are the"):
        evaluate(
            drawn,
            drawn.support,
            Settings(exclude_support=True),
            support=str(drawn.support),
        )


def test_its_own_images_are_noticed_where_it_holds_their_digests(drawn):
    holder = drawn.classifier
    assert len(holder.about.support_digests) == 12
    assert Evaluator(holder, QUICK).evaluate(str(drawn.test)).of_support == 4
    left = Evaluator(holder, Settings(bootstrap=0, exclude_support=True))
    assert left.evaluate(str(drawn.test)).images == 20


def test_support_that_is_not_there_is_named_as_such(drawn, tmp_path):
    with pytest.raises(FewShotError, match=r"support: .*none does not exist"):
        evaluate(drawn, support=str(tmp_path / "none"))


def test_a_folder_of_support_images_goes_with_support(drawn):
    with pytest.raises(FewShotError, match="support_images goes with support"):
        evaluate(drawn, support_images=str(drawn.support))
    with pytest.raises(FewShotError, match=r"support_images goes with a JSON .*; support=.* none"):
        evaluate(drawn, support=str(drawn.support), support_images=str(drawn.support))


@pytest.mark.parametrize("change", ["fewer", "more classes", "other pixels"])
def test_other_support_is_refused(drawn, tmp_path, change):
    shutil.copytree(drawn.support, tmp_path / "support")
    first = sorted((tmp_path / "support").iterdir())[0]
    if change == "fewer":
        sorted(first.iterdir())[0].unlink()
    elif change == "more classes":
        shutil.copytree(first, tmp_path / "support" / "other")
    else:
        another = sorted((drawn.test / first.name).iterdir())[-1]
        shutil.copy(another, sorted(first.iterdir())[0])
    said = {
        "fewer": "it has 2 images of",
        "more classes": "only one of the two has 'other'",
        "other pixels": "1 of its 12 images have other pixels",
    }
    with pytest.raises(FewShotError, match=said[change]):
        evaluate(drawn, support=str(tmp_path / "support"))


def test_fitted_temperature_depends_on_the_support_alone(drawn, test_copy):
    settings = Settings(bootstrap=0, temperature="fit")
    one, _ = evaluate(drawn, settings=settings, support=str(drawn.support))
    shutil.rmtree(sorted(test_copy.iterdir())[0])
    two, _ = evaluate(drawn, test_copy, settings, support=str(drawn.support))
    assert one.temperature == two.temperature != 1.0
    assert drawn.classifier.about.temperature == 1.0
    with pytest.raises(FewShotError, match=r"temperature=fit needs .* pass support"):
        evaluate(drawn, settings=settings)


def test_the_test_part_of_data_in_parts_is_evaluated(drawn, tmp_path):
    shutil.copytree(drawn.support, tmp_path / "data" / "train")
    shutil.copytree(drawn.test, tmp_path / "data" / "test")
    found, told = evaluate(drawn, tmp_path / "data", support=str(tmp_path / "data"))
    assert found.images == 24
    assert found.of_support == 4
    assert "images of the part for queries are evaluated" in told


def test_unknown_and_missing_classes(drawn, test_copy):
    first, second = sorted(test_copy.iterdir())[:2]
    first.rename(test_copy / "unheard of")
    with pytest.raises(FewShotError, match="does not know class 'unheard of'"):
        evaluate(drawn, test_copy)
    found, told = evaluate(drawn, test_copy, Settings(bootstrap=20, leave_out_unknown=True))
    assert found.images == 18
    assert found.left_out == {"unheard of": 6}
    assert found.missing == (first.name,)
    assert f"no images of 1 of the classifier's 4 classes ('{first.name}')" in told
    second.rename(test_copy / second.name.lower())
    with pytest.raises(FewShotError, match=f"'{second.name.lower()}' is '{second.name}' in the"):
        evaluate(drawn, test_copy)


def test_unreadable_images_are_refused_or_counted(drawn, test_copy):
    broken = sorted(test_copy.rglob("*.png"))[3]
    broken.write_bytes(b"no image")
    with pytest.raises(FewShotError, match=rf"can't read the image .*{broken.name}"):
        evaluate(drawn, test_copy)
    found, told = evaluate(drawn, test_copy, Settings(bootstrap=20, skip_unreadable=True))
    assert found.images == 23
    assert found.skipped == (str(broken.relative_to(test_copy)),)
    assert "left out: 1 image that can't be read" in told


def write_table(folder, rows, header=("image", "label", "patient")):
    with open(folder / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "list.csv"


def test_intervals_are_over_subjects_where_a_table_names_them(drawn, test_copy):
    paths = sorted(test_copy.rglob("*.png"))
    rows = [
        (path.relative_to(test_copy), path.parent.name, f"p{number // 3}" if number > 1 else "")
        for number, path in enumerate(paths)
    ]
    table = write_table(test_copy, rows)
    found, told = evaluate(drawn, table, Settings(bootstrap=200, group_column="patient"))
    plain, _ = evaluate(drawn, table, Settings(bootstrap=200))
    assert found.groups == 8 + 2
    assert "intervals are over the 10 subjects of column patient" in told
    assert [each.group for each in found.predictions][:3] == ["", "", "p0"]
    assert found.accuracy.value == plain.accuracy.value
    assert found.accuracy != plain.accuracy
    with pytest.raises(FewShotError, match="group_column"):
        evaluate(drawn, settings=Settings(group_column="patient"))


def test_other_images_of_subjects_of_its_own_are_noticed(drawn, test_copy):
    """Each class has one image that the classifier was made from; its patient shows two more."""
    rows = [
        (path.relative_to(test_copy), part.name, f"{part.name}{number // 3}")
        for part in sorted(test_copy.iterdir())
        for number, path in enumerate(sorted(part.iterdir()))
    ]
    table = write_table(test_copy, rows)
    found, told = evaluate(drawn, table, Settings(bootstrap=0, group_column="patient"))
    assert (found.images, found.of_support, found.of_support_subjects) == (24, 4, 8)
    assert "made from, and 8 more show the same subjects: accuracy on them is optimistic" in told
    excluding = Settings(bootstrap=0, group_column="patient", exclude_support=True)
    left, told = evaluate(drawn, table, excluding)
    assert left.images == 12
    assert left.groups == 4
    assert "left out: 4 images that the classifier was made from, and 8 more of the same" in told
    plain, _ = evaluate(drawn, table, Settings(bootstrap=0, exclude_support=True))
    assert plain.images == 20


def test_all_alike_gives_no_width_and_says_so(drawn, tmp_path):
    shutil.copytree(drawn.support, tmp_path / "data")
    found, told = evaluate(drawn, tmp_path / "data")
    assert found.accuracy == (1, 1, 1)
    assert "the interval of accuracy, balanced accuracy, macro F1" in told


def assert_evaluated(data, names, tmp_path):
    """A classifier of such classes is made, and evaluated from the command line."""
    words = tmp_path / "words.json"
    words.write_text(json.dumps({name: f"w{number}" for number, name in enumerate(names)}))
    made = fewshot.fit(
        data,
        str(model_directory()),
        method=fewshot.methods.ZeroShot(),
        settings=fewshot.FitSettings(folds=0),
        class_names=str(words),
    )
    made.save(tmp_path / "made")
    out = tmp_path / "out"
    arguments = ["evaluate", str(tmp_path / "made"), "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--bootstrap", "10", "--device", "cpu"]) == 0
    content = json.loads((out / "evaluation.json").read_text())
    assert sorted(each["label"] for each in content["classes"]) == sorted(names)
    assert content["missing_classes"] == []
    assert "<img" not in (out / "report.html").read_text()


@pytest.mark.slow
def test_folders_with_any_name(drawn, tmp_path):
    folder = os.fsencode(tmp_path / "data")
    names = [b"<img src=x>", b"=1+1", b"for\xeat", b"[bold]"]
    for name, part in zip(names, sorted(drawn.support.iterdir()), strict=True):
        shutil.copytree(os.fsencode(part), os.path.join(folder, name))
    shown = ["<img src=x>", "=1+1", "for\\xeat", "[bold]"]
    assert_evaluated(tmp_path / "data", shown, tmp_path)


@pytest.mark.slow
def test_labels_with_any_name(drawn, test_copy, tmp_path):
    names = ["<img src=x>", "=1+1", "../x", "/etc/passwd"]
    rows = [
        (path.relative_to(test_copy), name)
        for name, part in zip(names, sorted(test_copy.iterdir()), strict=True)
        for path in sorted(part.iterdir())
    ]
    assert_evaluated(write_table(test_copy, rows, ("image", "label")), names, tmp_path)


def test_logits_that_are_no_numbers_are_refused(drawn, monkeypatch):
    def logits(self, images):
        return torch.full((len(images), 4), float("nan"))

    monkeypatch.setattr(Scorer, "logits", logits)
    with pytest.raises(FewShotError, match=r"logits of .*png are not finite; make .* anew"):
        evaluate(drawn)
    short = drawn.classifier.with_precision("float16")
    with pytest.raises(FewShotError, match=r"logits of .*png are not finite; pass precision"):
        Evaluator(short, QUICK).evaluate(str(drawn.test))


@pytest.fixture
def arguments(drawn):
    return ["evaluate", str(drawn.folder), "--data", str(drawn.test), "--device", "cpu"]


def test_command_line(drawn, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out), "--bootstrap", "20"]) == 0
    captured = capsys.readouterr()
    assert "balanced accuracy" in captured.out
    assert captured.out.splitlines()[-1] == f"Page: {out / 'report.html'}"
    assert "leave them out with --exclude-support" in captured.err
    content = json.loads((out / "evaluation.json").read_text())
    assert content["scores"]["accuracy"]["value"] == evaluate(drawn)[0].accuracy.value
    before = (out / "report.html").read_bytes()
    assert main([*arguments, "--out", str(out), "--bootstrap", "20"]) == 0
    assert (out / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("style", "part"),
    [("csv", "score,value,95 % from,to"), ("markdown", "| score |"), ("latex", r"\toprule")],
)
def test_formats(arguments, style, part, capsys):
    assert main([*arguments, "--format", style, "--bootstrap", "0"]) == 0
    assert part in capsys.readouterr().out


@pytest.mark.slow
def test_a_temperature_is_kept_where_it_is_asked_for(drawn, arguments, tmp_path, capsys):
    folder = tmp_path / "classifier"
    shutil.copytree(drawn.folder, folder)
    arguments[1] = str(folder)
    assert main([*arguments, "--temperature", "2.5"]) == 0
    assert fewshot.load_classifier(folder).about == drawn.classifier.about
    assert main([*arguments, "--temperature", "2.5", "--keep-temperature"]) == 0
    read = fewshot.load_classifier(folder)
    assert read.about.temperature == 2.5
    assert read.about.labels == drawn.classifier.about.labels
    capsys.readouterr()
    assert_refused(capsys, [*arguments, "--keep-temperature"], "--keep-temperature needs one")


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--temperature", "hot"], ["--temperature must be a number above 0", "'hot'"]),
        (["--temperature", "0"], ["--temperature must be a number above 0"]),
        (["--temperature", "nan"], ["--temperature must be a number above 0"]),
        (["--temperature", "fit"], ["--temperature fit needs", "pass --support"]),
        (["--bootstrap", "-1"], ["--bootstrap must be at least 0"]),
        (["--batch-size", "0"], ["--batch-size must be at least 1"]),
        (["--group-column", "patient"], ["--group-column"]),
        (["--out", ""], ["--out", "it is empty"]),
    ],
)
def test_wrong_options_are_refused(arguments, extra, parts, capsys):
    # Not auto, of which a line would be told.
    assert_refused(capsys, [*arguments, *extra], *parts)
