"""The field's table: methods against data sets, with marks, intervals, and names that tell."""

import csv
import io

import pytest
from made_runs import write_run

from tir_kernels.analysis.page import tables_text
from tir_kernels.analysis.page.columns import blocks_of
from tir_kernels.analysis.page.field import MARKS, UNEVEN, accuracy_table, difference_table
from tir_kernels.analysis.page.runs import load_runs
from tir_kernels.analysis.page.tables import NONE_FOUND, shown, written
from tir_kernels.fewshot.run.statistics import mean_of_means
from tir_kernels.fewshot.run.summary import Estimate

CLASSES = list("abcde")
ARMS = {"zero-shot": "zero-shot", "lora": "lora", "tir": "tir"}
SAME = {"seed": 0, "data": "content 1", "model": "content 2"}  # with fingerprints
HITS = {"zero-shot": [30, 30, 33], "lora": [45, 42, 48], "tir": [51, 48, 51]}


def make(folder, **changes):
    return write_run(folder, **{"arms": ARMS, "classes": CLASSES, "is_tracked": False} | changes)


def blocks(*folders, baseline=None):
    return blocks_of(load_runs(folders, baseline), baseline)


def cells(table):
    """Row's name -> heading -> cell."""
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


@pytest.fixture
def two(tmp_path):
    """Two data sets; in the second, tir has not all episodes and zero-shot ties with lora."""
    first = make(tmp_path / "first", correct=HITS, data="x/eurosat")
    other = {"zero-shot": [30, 33, 36], "lora": [33, 33, 33], "tir": [60, 60, 60]}
    finished = {"tir": [0, 1]}
    second = make(tmp_path / "second", correct=other, data="x/isic2018", finished=finished)
    return first, second


def test_accuracies_stand_by_data_set_with_intervals_and_their_mean(two):
    (block,) = blocks(*two)
    table = accuracy_table(block)
    assert table.title == "Accuracy in %, 1 shot per class"
    assert table.columns == ("arm", "label", "eurosat", "isic2018", "mean")
    found = cells(table)
    assert [row["label"] for row in found.values()] == ["F", "T", "T"]
    eurosat = Estimate.of([45 / 75, 42 / 75, 48 / 75])
    isic = Estimate.of([33 / 75] * 3)
    assert found["lora"]["eurosat"].estimate == eurosat
    assert found["lora"]["mean"].estimate == mean_of_means([eurosat, isic])
    assert shown(found["lora"]["mean"]) == "52.0 ± 5.0"
    assert "5 ways, 15 queries per class, seed 0, ViT-S-32, 3 episodes." in table.notes


def test_best_and_second_best_are_marked_among_arms_with_all_episodes(two):
    (block,) = blocks(*two)
    table = accuracy_table(block)
    found = cells(table)
    places = {arm: [found[arm][name].place for name in table.columns[2:]] for arm in ARMS}
    assert places == {"zero-shot": [0, 0, 2], "lora": [2, 0, 1], "tir": [1, 0, 0]}
    assert shown(found["tir"]["isic2018"]) == "80.0 ± 0.0 (n = 2)"
    assert shown(found["tir"]["mean"]).endswith("(n = 5)")
    assert {MARKS, UNEVEN} <= set(table.notes)


def test_means_that_look_alike_share_a_mark(tmp_path):
    hits = {"zero-shot": [30] * 3, "lora": [45] * 3, "tir": [45] * 3}
    arms = {**ARMS, "linear-probe": "linear-probe"}
    hits["linear-probe"] = [44] * 3
    (block,) = blocks(make(tmp_path / "tied", arms=arms, correct=hits))
    found = cells(accuracy_table(block))
    assert [row["eurosat"].place for row in found.values()] == [0, 1, 1, 2]
    alike = dict.fromkeys(ARMS, [45] * 3)
    (block,) = blocks(make(tmp_path / "alike", correct=alike))
    table = accuracy_table(block)
    assert [row["eurosat"].place for row in cells(table).values()] == [0, 0, 0]
    assert MARKS not in table.notes


def test_each_format_has_the_marks(two):
    (block,) = blocks(*two)
    table = accuracy_table(block)
    markdown, latex = written(table, "markdown"), written(table, "latex")
    assert "**66.7 ± 5.7**" in markdown
    assert "<u>60.0 ± 9.9</u>" in markdown
    assert r"\textbf{66.7 $\pm$ 5.7}" in latex
    assert r"\underline{60.0 $\pm$ 9.9}" in latex
    heads, *rows = csv.reader(io.StringIO(written(table, "csv")))
    assert heads[2:7] == [
        "eurosat",
        "eurosat: half of the 95 % interval",
        "isic2018",
        "isic2018: half of the 95 % interval",
        "isic2018: episodes",
    ]
    assert rows[2][:7] == ["tir", "T", "66.7", "5.7", "80.0", "0.0", "2"]
    text = tables_text(two, "text")
    assert "│ 66.7 ± 5.7 ¹ │" in text
    assert "│ 60.0 ± 9.9 ² │" in text
    assert "¹ highest, ² second highest mean of a column." in text


def test_differences_are_over_the_episodes_that_both_have(two):
    (block,) = blocks(*two)
    table = difference_table(block)
    assert table.title == "Difference to lora in points, 1 shot per class"
    found = cells(table)
    assert list(found) == ["zero-shot", "tir"]
    assert shown(found["tir"]["eurosat"]) == "+6.7 ± 5.7"
    assert shown(found["tir"]["isic2018"]) == "+36.0 ± 0.0 (n = 2)"
    assert shown(found["zero-shot"]["mean"]).startswith("−9.3 ± ")
    (block,) = blocks(*two, baseline="tir")
    found = cells(difference_table(block))
    assert list(found) == ["zero-shot", "lora"]
    assert found["lora"]["isic2018"].estimate.episodes == 2


def test_an_arm_that_a_data_set_lacks_has_no_mean(tmp_path):
    first = make(tmp_path / "first")
    arms = {"zero-shot": "zero-shot", "linear-probe": "linear-probe"}
    second = make(tmp_path / "second", arms=arms, data="x/isic2018")
    (block,) = blocks(first, second)
    assert block.baseline == "lora"
    found = cells(accuracy_table(block))
    assert found["lora"]["isic2018"] == found["lora"]["mean"] == "–"
    assert found["linear-probe"]["eurosat"] == "–"
    assert found["zero-shot"]["mean"].estimate.episodes == 6
    lines = cells(difference_table(block))
    assert lines["linear-probe"] == {
        "arm": "linear-probe",
        "label": "F",
        **dict.fromkeys(["eurosat", "isic2018", "mean"], "–"),
    }
    nothing = make(tmp_path / "nothing", finished=dict.fromkeys(ARMS, ()), data="x/chestx")
    (block,) = blocks(first, nothing)
    found = cells(accuracy_table(block))
    assert shown(found["lora"]["chestx"]) == NONE_FOUND
    assert found["lora"]["mean"] == "–"


def test_shots_have_tables_of_their_own(tmp_path):
    folders = [make(tmp_path / f"{n}", shots=n) for n in (5, 1)]
    assert [block.title for block in blocks(*folders)] == ["1 shot per class", "5 shots per class"]
    text = tables_text(folders, "markdown")
    assert text.index("1 shot per class") < text.index("5 shots per class")


def test_runs_of_the_same_episodes_are_one_column(tmp_path):
    """Then methods meet that ran at different times, and are paired by episode."""
    first = make(tmp_path / "a", arms={"lora": "lora"}, correct={"lora": [30, 45, 60]}, others=SAME)
    arms = {"tip": "tip-adapter", "lora": "lora"}
    hits = {"tip": [33, 48, 63], "lora": [30, 45, 60]}
    finished = {"lora": [0]}
    second = make(
        tmp_path / "b", arms=arms, correct=hits, finished=finished, others=SAME | {"device": "cuda"}
    )
    (block,) = blocks(first, second)
    (column,) = block.columns
    assert column.name == "eurosat"
    found = cells(accuracy_table(block))
    assert found["lora"]["eurosat"].estimate.episodes == 3, "the run with more of them counts"
    (line,) = cells(difference_table(block)).values()
    assert shown(line["eurosat"]) == "+4.0 ± 0.0"


@pytest.mark.parametrize(
    "changes",
    [
        {"others": SAME | {"seed": 1}},
        {"others": SAME | {"data": "content 3"}},
        {"others": SAME | {"precision": "bfloat16"}},
        {"classes": list("abcdf")},
        {"options": {"lora": {"steps": 50}}},
    ],
)
def test_other_runs_are_columns_of_their_own(tmp_path, changes):
    first = make(tmp_path / "a", others=SAME)
    second = make(tmp_path / "b", **{"others": SAME} | changes)
    (block,) = blocks(first, second)
    assert [column.name for column in block.columns] == ["eurosat (a)", "eurosat (b)"]


def test_runs_that_do_not_tell_their_images_are_never_one(tmp_path):
    (block,) = blocks(make(tmp_path / "a"), make(tmp_path / "b"))
    assert len(block.columns) == 2


def test_fixed_numbers_stand_in_the_names(tmp_path):
    """So that one method with two settings is never taken for one row."""
    arms = {"lora": "lora", "tip": "tip-adapter", "late": "tir"}
    folders = [
        make(
            tmp_path / data,
            arms=arms,
            data=data,
            options={"tip": {"alpha": alpha}, "late": {"steps": 100, "layers": [9, 10]}},
        )
        for data, alpha in (("eurosat", 1.0), ("isic2018", 2.5))
    ]
    (block,) = blocks(*folders)
    table = accuracy_table(block)
    found = cells(table)
    names = ["lora", "tip[alpha=1, beta=5.5]", "late", "tip[alpha=2.5, beta=5.5]"]
    assert list(found) == names
    assert found[names[1]]["mean"] == found[names[3]]["mean"] == "–"
    (note,) = [note for note in table.notes if note.startswith("Options that differ")]
    assert "lora=lora,steps=30; tip=tip-adapter; late=tir,layers=9,10" in note


def test_options_that_differ_between_data_sets_are_told_with_them(tmp_path):
    folders = [
        make(tmp_path / data, data=data, options={"lora": {"steps": steps}})
        for data, steps in (("eurosat", 50), ("isic2018", 100))
    ]
    (block,) = blocks(*folders)
    (note,) = [own for own in accuracy_table(block).notes if own.startswith("Options that differ")]
    assert "lora=lora,steps=50 (eurosat)" in note
    assert "isic2018" not in note


def test_facts_that_data_sets_do_not_share_are_told_of_each(tmp_path):
    first = make(tmp_path / "a", episodes=2)
    second = make(tmp_path / "b", data="x/isic2018", classes=list("abc"), others={"queries": 25})
    (block,) = blocks(first, second)
    told = (
        "seed 0, ViT-S-32; eurosat: 5 ways, 15 queries per class, 2 episodes; "
        "isic2018: 3 ways, 25 queries per class, 3 episodes."
    )
    assert told in accuracy_table(block).notes
