"""Arms compared: the tables of page and terminal, and what is said of runs that were stopped."""

import csv
import io

import pytest
from made_runs import sections, text_of, write_run
from rich.console import Console

from tir_kernels.analysis.page import tables_text, write_page
from tir_kernels.analysis.page.accuracy import UNEVEN
from tir_kernels.analysis.page.comparison import ACCURACY, CHANGE, comparison_tables, separation
from tir_kernels.analysis.page.tables import PValue, shown, written
from tir_kernels.fewshot.ablate import print_ablation
from tir_kernels.fewshot.run.ablation import References, compare, read_ablation

ARMS = {
    "lora": "lora",
    "tir": "tir",
    "zero-shot": "zero-shot",
    "linear-probe": "linear-probe",
    "tir@both": "tir",
    "tir@random": "tir",
}
FINISHED = {"tir@both": range(2), "tir@random": ()}  # of 5


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    return write_run(folder, arms=ARMS, classes=list("abcde"), episodes=5, finished=FINISHED)


def tables_of(text):
    """Title -> arm -> heading -> cell."""
    found = {}
    for block in text.split("\n\n"):
        title, heads, *rows = csv.reader(io.StringIO(block))
        found[title[0]] = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}
    return found


def test_a_stopped_run_tells_the_episodes_of_each_arm_and_compares_what_both_have(stopped):
    tables = tables_of(tables_text([stopped], "csv"))
    own = tables["Accuracy of each arm"]
    assert [row["episodes"] for row in own.values()] == ["5", "5", "5", "5", "2", "0"]
    compared = tables["Arms compared"]
    assert [row["pairs"] for row in compared.values()] == ["–", "5", "5", "5", "2", "0"]
    # As made: arms 0 and 4 in episodes 0 and 1, of 75 queries each.
    by_hand = 100 * ((53 + 0) + (53 + 7) - (25 + 0) - (25 + 5)) / 2 / 75
    assert float(compared["tir@both"]["minus lora, points"]) == pytest.approx(by_hand, abs=0.05)
    assert compared["tir@random"]["p (Holm)"] == "–"
    assert compared["tir@random"]["minus lora, points"] == ""
    assert compared["linear-probe[inverse_penalty=100]"]["minus linear-probe, points"] == "–"
    assert float(compared["tir"]["minus linear-probe, points"]) < 0
    sinks = [title for title in tables if title.endswith("last step minus first")]
    assert len(sinks) == 3
    for title in sinks:
        assert tables[title]["tir@both"]["pairs"] == "2"
        assert "zero-shot" not in tables[title] or tables[title]["zero-shot"]["episodes"] == "0"


@pytest.mark.slow
def test_the_page_of_a_stopped_run_says_that_it_is_one(stopped):
    source = text_of(write_page([stopped], stopped / "report.html"))
    assert "0 to 5 of 5 episodes" in source
    header = source[source.index("<header>") : source.index("</header>")]
    assert UNEVEN in header
    assert source.count("<figcaption>Arms compared</figcaption>") == 1
    assert sections(source)[:3] == ["Accuracy", "Arms compared", "Arms compared in sinks"]


def test_page_and_terminal_have_the_same_numbers(stopped):
    text = io.StringIO()
    ablation = read_ablation(stopped, list(ARMS), "lora")
    print_ablation(ablation, Console(file=text, width=200))
    on_page = tables_of(tables_text([stopped], "csv"))
    for table in comparison_tables(ablation):
        assert tables_of(written(table._replace(title="x"), "csv").join(["x\n", ""])) == {
            "x": on_page[table.title]
        }
        for row in table.rows:
            line = next(line for line in text.getvalue().splitlines() if f"│ {row[0]} " in line)
            assert shown(row[1]) in line
    assert ablation.to_json()["probe"] == "linear-probe"
    assert ablation.to_json()["baseline"] == "lora"


def sentence(unit=ACCURACY, frozen=(), **values):
    by_episode = {arm: dict(enumerate(own)) for arm, own in values.items()}
    references = References("lora", frozen=frozen)
    return separation(compare(by_episode, references), references, unit)


def test_what_is_separated_is_named_with_its_p():
    text = sentence(lora=[0.5] * 4, a=[0.6, 0.6, 0.61, 0.6], b=[0.5, 0.5, 0.6, 0.4])
    assert text.startswith("Separated from lora: a (+10.2 ± 0.8 points over 4 pairs, p < 0.001)")
    assert text.endswith("; the other is not.")


def test_where_nothing_is_separated_the_fewest_episodes_are_told():
    small, large = [0.5, 0.52, 0.5, 0.5], [0.5, 0.6, 0.55, 0.52]
    text = sentence(lora=[0.5] * 4, a=small, b=large)
    values = {"lora": [0.5] * 4, "a": small, "b": large}
    arms = compare({arm: dict(enumerate(own)) for arm, own in values.items()}, References("lora"))
    needed = min(own.episodes_needed for own in arms if own.arm != "lora")
    assert text.startswith("No arm is separated from lora; ")
    assert f"at least {needed} episodes: for b (" in text


def test_frozen_arms_are_spoken_of_where_there_are_no_others():
    values = {"lora": [0.5] * 4, "zero": [0.1, 0.1, 0.11, 0.1]}
    assert sentence(frozen=("zero",), **values).startswith("Separated from lora: zero (")
    text = sentence(frozen=("zero",), **values, a=[0.5, 0.6, 0.4, 0.5])
    assert text.startswith("a is not separated from lora")
    assert "zero" not in text


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ({"a": []}, "since none shares two episodes with it."),
        ({"a": [0.5]}, "since none shares two episodes with it."),
        ({"a": [0.5, 0.5, 0.5]}, "which no number of episodes mends."),
        ({}, ""),
    ],
)
def test_what_is_said_without_a_test(values, end):
    text = sentence(lora=[0.5, 0.5, 0.5], **values)
    assert text.endswith(end)
    assert bool(text) == bool(values)


def test_changes_have_as_many_digits_as_count():
    text = sentence(CHANGE, lora=[0.0, 0.0, 0.0], a=[0.001, 0.002, 0.001])
    assert "a (+0.00133 ± 0.00143 over 3 pairs, p = " in text


def test_p_values_are_shown_to_three_digits_and_written_in_full():
    assert [shown(PValue(p)) for p in (1.0, 0.0512, 0.0004)] == ["1.000", "0.051", "< 0.001"]
