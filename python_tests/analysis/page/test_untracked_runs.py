"""Runs without tracking: their pages and tables, alone and side by side."""

import csv

import pytest
from made_runs import ARMS, sections, text_of, write_run

from tir_kernels.analysis.page import tables_text, write_page
from tir_kernels.errors import FewShotError


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untracked") / "run"
    return write_run(folder, classes=list("abcde"), is_tracked=False, shots=5, data="made/isic2018")


def test_a_run_without_tracking_has_its_accuracy_and_says_how_to_get_the_rest(untracked):
    source = text_of(write_page([untracked], untracked / "report.html"))
    assert sections(source) == [
        "Accuracy",
        "Arms compared",
        "Inside the image tower",
        "Settings",
    ]
    assert "--track every=10" in source
    told = "tir is not separated from lora; with differences as they are, it would take at least"
    assert f"{told} 4 episodes: for tir (+12.0 ± 8.8 points over 3 pairs, p = 0.055)." in source


def test_several_runs_stand_side_by_side(untracked, tmp_path):
    other = write_run(tmp_path / "other", classes=list("abcde"), is_tracked=False)
    source = text_of(write_page([other, untracked], tmp_path / "all.html"))
    assert sections(source)[:3] == [
        "All data sets, 1 shot per class",
        "All data sets, 5 shots per class",
        "Accuracy",
    ]
    assert sections(source).count("Accuracy") == 2
    assert "<title>2 runs</title>" in source
    tables = tables_text([other, untracked], "markdown")
    assert "1 shot per class" in tables
    assert "| arm | label | eurosat |" in tables
    assert "| arm | label | isic2018 |" in tables
    both = tables_text([untracked, other, other], "csv")
    assert "eurosat (other)" in both


def test_a_file_that_is_no_page_is_kept(untracked, tmp_path):
    other = tmp_path / "thesis.html"
    other.write_text("<!doctype html>\nmine")
    with pytest.raises(FewShotError, match="is not a report; choose another name"):
        write_page([untracked], other)
    assert other.read_text() == "<!doctype html>\nmine"
    with pytest.raises(FewShotError, match=r"can't read .*settings.json"):
        write_page([tmp_path], tmp_path / "report.html")


def test_the_baseline_is_chosen(untracked):
    first, _quoted, second = tables_text([untracked], "csv", baseline="tir").split("\n\n")
    assert first.startswith("Accuracy of each arm\narm,")
    rows = {row[0]: row for row in csv.reader(first.splitlines())}
    assert rows["lora"][5] == "0 of 3"
    title, heads, *lines = csv.reader(second.splitlines())
    assert title == ["Arms compared"]
    rows = {row[0]: dict(zip(heads, row, strict=True)) for row in lines}
    lora = rows["lora"]
    assert float(lora["minus tir, points"]) == pytest.approx(-12.0, abs=0.05)
    assert float(lora["p (Holm)"]) == pytest.approx(0.0276, abs=1e-4)
    assert lora["pairs"] == "3"
    assert int(lora["episodes needed"]) > 3
    assert rows["tir"]["minus tir, points"] == rows["tir"]["p (Holm)"] == "–"
    with pytest.raises(FewShotError, match="baseline must be one of zero-shot, lora, tir; got 'x'"):
        tables_text([untracked], "csv", baseline="x")
    assert list(ARMS) == list(rows)
