"""Published numbers: apart, named as quoted, and only where the table has such data and shots."""

import pytest
from made_runs import sections, text_of, write_run

from tir_kernels.analysis.page import tables_text, write_page
from tir_kernels.analysis.page.columns import blocks_of
from tir_kernels.analysis.page.field import field_tables
from tir_kernels.analysis.page.quoted import known_as, published
from tir_kernels.analysis.page.runs import load_runs
from tir_kernels.fewshot.methods.families import FAMILIES

CLASSES = list("abcde")


def make(folder, **changes):
    return write_run(folder, **{"classes": CLASSES, "is_tracked": False} | changes)


def quoted(*folders):
    """The quoted tables beside some runs."""
    tables = [table for block in blocks_of(load_runs(folders)) for table in field_tables(block)]
    return [table for table in tables if table.is_quoted]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("EuroSAT_RGB", "eurosat"),
        ("EuroSAT_RGB:test", "eurosat"),
        ("ISIC2018_Task3_Training_Input", "isic2018"),
        ("PlantVillage-Dataset", "cropdiseases"),
        ("NIH Chest X-rays", "chestx"),
        ("eurosat-clouds", None),
        ("", None),
    ],
)
def test_data_are_known_by_their_names(name, key):
    assert known_as(name) == key


def test_the_columns_are_the_data_sets_of_the_table(tmp_path):
    folders = [make(tmp_path / data, data=f"x/{data}") for data in ("eurosat", "mine", "chestx")]
    (table,) = quoted(*folders)
    assert table.columns == ("method", "label", "model", "EuroSAT", "ChestX", "mean", "source")
    rows = {row[0]: row for row in table.rows}
    expected = ("T", "CLIP ViT-B/16", "82.53", "23.98", "53.26", "arXiv 2605.25799")
    assert rows["TIR"][1:] == expected
    assert rows["StepSPT"][1] == "Q"
    assert rows["StepSPT"][-1] == "arXiv 2411.10070, as in arXiv 2605.29776"
    assert "StyleAdv-FT" not in rows, "which has numbers for 5 shots alone"
    assert any(note.startswith("Quoted, not run here") for note in table.notes)
    assert any(
        note.startswith("StepSPT: 600 episodes; trained on the unlabelled") for note in table.notes
    )
    assert any("S: trained on a labelled source data set" in note for note in table.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "x/mine"},
        {"shots": 3},
        {"classes": list("abc"), "others": {"queries": 25}},
    ],
)
def test_other_data_shots_and_ways_have_none(tmp_path, changes):
    assert quoted(make(tmp_path / "run", **changes)) == []
    assert "Quoted" not in tables_text([make(tmp_path / "again", **changes)], "markdown")


def test_quoted_numbers_take_no_part_in_what_was_run(tmp_path):
    """However high they are: best and second best are rows that ran."""
    low = {arm: [place + 1] * 3 for place, arm in enumerate(("zero-shot", "lora", "tir"))}
    folders = [make(tmp_path / data, data=data, correct=low) for data in ("eurosat", "chestx")]
    for style in ("markdown", "latex", "text"):
        own, rest = tables_text(folders, style).split("Quoted from papers", 1)
        assert "TIR" not in own
        assert "4.0 ± 0.0" in own or r"4.0 $\pm$ 0.0" in own
        for mark in ("**8", "<u>", r"\textbf", r"\underline", " ¹ ", " ² "):
            assert mark not in rest
    assert r"\begingroup\color{gray}" in tables_text(folders, "latex")


def test_a_single_run_has_them_below_its_accuracy(tmp_path):
    text = tables_text([make(tmp_path / "run", data="eurosat")], "markdown")
    assert "**Quoted from papers: accuracy in %, 1 shot per class**" in text
    assert "| method | label | model | EuroSAT | source |" in text


def test_each_entry_refers_to_what_is_there():
    content = published()
    names = [name for own in content["data"].values() for name in own["names"]]
    assert len(set(names)) == len(names)
    assert len(content["rows"]) > 15
    for row in content["rows"]:
        assert row["shots"] in (1, 5)
        assert set(row["accuracy"]) == set(content["data"])
        assert all(20 < value < 100 for value in row["accuracy"].values())
        assert row["label"] in {family.label for family in FAMILIES.values()}
        for name, part in (("paper", "papers"), ("table", "papers"), ("model", "models")):
            assert row[name] in content[part]
        assert row["differs"] in content["differences"]


@pytest.mark.slow
def test_the_page_has_them_grey_in_a_table_of_their_own(tmp_path):
    folders = [make(tmp_path / data, data=data) for data in ("eurosat", "chestx")]
    source = text_of(write_page(folders, tmp_path / "all.html"))
    assert sections(source)[0] == "All data sets, 1 shot per class"
    before, _, rest = source.partition('<figure class="data quoted">')
    table = rest.partition("</figure>")[0]
    assert '<th scope="row">TIR</th>' in table
    assert "<strong>" not in table
    assert "TIR<" not in before
    assert before.count("<strong>") == 3
    assert before.count("<u>") == 3
