"""Files of an evaluation are safe whatever classes and images are called."""

import csv
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.evaluation.evaluation import Evaluation, Prediction
from tir_kernels.fewshot.evaluation.files import write_files
from tir_kernels.fewshot.evaluation.scores import compute_scores

LABELS = (
    "<img src=x onerror=alert(1)>",
    "=1+1",
    "../../etc/passwd",
    "for\\xeat",
    "$\\frac{1}{2}$ {{ 7*7 }}",
    '\x1b[31mred, "quoted"\n',
)


@pytest.fixture
def found():
    random = np.random.default_rng(0)
    targets = random.integers(0, len(LABELS), 60)
    logits = random.normal(size=(60, len(LABELS))).astype(np.float32)
    scores = compute_scores(logits, targets, LABELS, 1.0, resamples=50)
    predictions = [
        Prediction(f"@image{n}\udcea.png", "=patient", LABELS[at], LABELS[at], 0.5, 0.5)
        for n, at in enumerate(targets)
    ]
    return Evaluation(
        labels=LABELS,
        images=60,
        scores=scores.scores,
        classes=scores.classes,
        confusion=tuple(map(tuple, scores.confusion.tolist())),
        calibration=scores.calibration,
        temperature=1.0,
        groups=None,
        of_support=0,
        of_support_subjects=0,
        missing=(),
        left_out={"<b>left</b>": 1},
        skipped=("a\udcea.png",),
        notes=("left out: <b>left</b>",),
        predictions=tuple(predictions),
    )


def test_nothing_is_taken_for_markup_or_a_formula(found, tmp_path):
    page = write_files(found, tmp_path).read_text()
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<b>left" not in page
    assert "{{ 7*7 }}" in page
    assert "\x1b" not in page
    assert "script" not in page.replace("runs no scripts", "")
    for name in ("per_class", "confusion", "predictions"):
        with open(tmp_path / f"{name}.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert len({len(row) for row in rows}) == 1
        cells = [cell for row in rows for cell in row]
        assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]
        assert "'=1+1" in cells
    for name in ("confusion", "reliability"):
        ElementTree.parse(tmp_path / "figures" / f"{name}.svg")
        with Image.open(tmp_path / "figures" / f"{name}.png") as image:
            assert min(image.size) > 200
    assert not (tmp_path.parent / "etc").exists()


def test_numbers_in_the_files_are_those_found(found, tmp_path):
    write_files(found, tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["scores"]["accuracy"]["value"] == found.accuracy.value
    assert content["confusion"] == [list(row) for row in found.confusion]
    assert [each["label"] for each in content["classes"]] == list(LABELS)
    with open(tmp_path / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [[int(cell) for cell in row[1:]] for row in rows] == content["confusion"]


def test_the_same_evaluation_gives_the_same_bytes(found, tmp_path):
    for name in ("one", "two"):
        write_files(found, tmp_path / name)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(names) == 10
    for name in names:
        if (tmp_path / "one" / name).is_file():
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_many_classes_are_drawn_without_names(found, tmp_path):
    count = 300
    targets = np.arange(count)
    logits = np.eye(count, dtype=np.float32)
    labels = tuple(f"class {n}" for n in range(count))
    scores = compute_scores(logits, targets, labels, 1.0)
    many = replace(
        found,
        labels=labels,
        images=count,
        classes=scores.classes,
        confusion=tuple(map(tuple, scores.confusion.tolist())),
    )
    assert write_files(many, tmp_path).stat().st_size < 2_000_000
    assert (tmp_path / "figures" / "confusion.svg").stat().st_size < 1_000_000


def test_a_folder_that_cannot_be_made_is_refused(found, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FewShotError, match="out: can't make"):
        write_files(found, tmp_path / "file")
