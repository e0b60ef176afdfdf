"""Every family of towers on the command line, from its folder to a page; weights are random."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import write_images
from towers.families import FAMILIES, Family, small_timm

from tir_kernels.analysis.measures import MEASURES
from tir_kernels.fewshot.classifier.fit_folder import FIT_FOLDER
from tir_kernels.fewshot.classifier.folder import load_classifier
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.journal import JournalReader
from tir_kernels.fewshot.run.maps import read_maps
from tir_kernels.fewshot.run.tracked import read_tracked

pytestmark = pytest.mark.slow

IN_FOLDERS = [family for family in FAMILIES if not family.is_refused]
PLACEMENTS = ["attention", "both"]
# One of each way to use a tower; each method alone is tried for docs/towers.md.
METHODS_TRIED = ["tir", "lora", "zero-shot", "linear-probe", "coop", "attention-temperature"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"red": 5, "light blue": 5, "green": 5, "a dark grey": 5}
    return write_images(tmp_path_factory.mktemp("images"), sizes)


@pytest.fixture(params=IN_FOLDERS, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def model(family: Family, tmp_path: Path):
    family.write(tmp_path / "model")
    with small_timm():
        yield tmp_path / "model"


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0, capsys.readouterr().err


def test_run_and_report(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arms = [f"--method={name}" for name in METHODS_TRIED]
    arms += [f"--arm={each}=tir,placement={each}" for each in PLACEMENTS]
    arms += ["--arm=centroids=tir,relevance=centroids"]
    sizes = ["--ways=3", "--shots=2", "--queries=3", "--episodes=2", "--steps=2", "--device=cpu"]
    where = ["--data", str(images), "--model", str(model), "--out", str(out)]
    with mock.patch("tir_kernels.fewshot.command.show_page"):  # drawn below
        options = [*sizes, *arms, "--track=every=2,maps=1", "--parallel-episodes=2"]
        run(["run", *where, *options], capsys)
    records = JournalReader(out).news()
    assert len(records) == 2 * len(arms)
    assert {record.status for record in records} == {"ok"}
    rows = read_tracked(out)
    tracked = {row.arm for row in rows}
    assert tracked >= {"tir", "lora", *PLACEMENTS, "centroids"}
    assert {row.measure for row in rows} == set(MEASURES)
    assert {row.block for row in rows} == set(range(5))
    found = {maps.arm: maps for maps in read_maps(out)}
    assert found.keys() == tracked
    for maps in found.values():
        assert maps.grid == (4, 4)
        assert maps.counts.shape == maps.received_after.shape == (6, 16)
        assert maps.received_after.sum(1).max() <= 1
    # Each of the 3 classes picks 4 of 16 patches, whatever stands in front of them.
    assert (found["tir"].counts.sum(1) == 12).all()
    assert not np.array_equal(found["tir"].weights, np.ones_like(found["tir"].weights))

    run(["report", str(out), "--out", str(tmp_path / "page.html")], capsys)
    assert len((tmp_path / "page.html").read_text()) > 10_000


def test_fit_predict_evaluate_and_export(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "classifier"
    where = ["--data", str(images), "--model", str(model), "--out", str(folder)]
    options = ["--method=tir", "--steps=2", "--folds=2", "--device=cpu"]
    run(["fit", *where, *options, "--track=every=2,measures=sink-ratio"], capsys)
    assert (folder / "report.html").exists()
    assert {row.block for row in read_tracked(folder / FIT_FOLDER)} == set(range(5))

    table = tmp_path / "predictions.csv"
    run(["predict", str(folder), str(images), "--out", str(table), "--device=cpu"], capsys)
    classifier = load_classifier(folder)
    paths = sorted(images.rglob("*.png"))
    with table.open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert len(rows) == len(paths)
    expected = classifier.predict(paths)
    names = list(classifier.about.labels)
    for path, own in zip(paths, expected, strict=True):
        (row,) = (row for name, row in rows.items() if path.match(name))
        assert row["label"] == names[int(own.argmax())]

    tables, quick = tmp_path / "tables", ["--bootstrap=0", "--device=cpu"]
    run(["evaluate", str(folder), "--data", str(images), "--out", str(tables), *quick], capsys)
    right = sum(rows[name]["label"] == Path(name).parent.name for name in rows)
    scores = json.loads((tables / "evaluation.json").read_text())["scores"]
    assert scores["accuracy"]["value"] == pytest.approx(right / len(rows))

    merged, whole = tmp_path / "merged", tmp_path / "whole"
    run(["export", str(folder), "--merged", str(merged), "--with-base", str(whole)], capsys)
    model.rename(tmp_path / "away")
    image = classifier.model.preprocess(Image.open(paths[0]).convert("RGB"))[None]
    logits = []
    for each in (classifier, load_classifier(whole)):
        with each.open() as scorer:
            logits.append(scorer.logits(image))
    torch.testing.assert_close(*logits)
