"""Ranks over data sets: who is told apart, what is said, and the picture."""

import re
import sys

import numpy as np
import pytest
from made_runs import sections, text_of, write_run
from scipy import stats

from tir_kernels.analysis.figures import Chart, Ranks, draw
from tir_kernels.analysis.page import write_page
from tir_kernels.analysis.page.columns import blocks_of
from tir_kernels.analysis.page.ranks import can_be_ranked, ranking
from tir_kernels.analysis.page.runs import load_runs

DATA = ("eurosat", "isic2018", "plantvillage", "chestx", "mine", "yours")
ARMS = {name: "tir" for name in "abcdefghijkl"}
STYLES = {arm: number for number, arm in enumerate(ARMS)}


def make(folder, data, hits, **changes):
    arms = {arm: ARMS[arm] for arm in hits}
    correct = {arm: [own, own] for arm, own in hits.items()}
    return write_run(
        folder / data,
        data=data,
        arms=arms,
        episodes=2,
        correct=correct,
        is_tracked=False,
        **changes,
    )


def block_of(folder, tables, **changes):
    """Of data set -> arm -> right answers."""
    folders = [make(folder, data, hits, **changes) for data, hits in tables.items()]
    (block,) = blocks_of(load_runs(folders))
    return block


def test_three_data_sets_and_arms_can_be_ranked(tmp_path):
    three = {arm: 30 for arm in "abc"}
    assert can_be_ranked(block_of(tmp_path / "3", dict.fromkeys(DATA[:3], three)))
    assert not can_be_ranked(block_of(tmp_path / "2", dict.fromkeys(DATA[:2], three)))
    two = {arm: 30 for arm in "ab"}
    assert not can_be_ranked(block_of(tmp_path / "arms", dict.fromkeys(DATA[:3], two)))
    unfinished = block_of(
        tmp_path / "unfinished", dict.fromkeys(DATA[:3], three), finished={"a": [0]}
    )
    assert not can_be_ranked(unfinished)
    folders = [make(tmp_path / name, DATA[0], three) for name in ("x", "y", "z")]
    (same,) = blocks_of(load_runs(folders))
    assert len(same.columns) == 3
    assert not can_be_ranked(same), "one data set three times tells of one"


def test_a_page_says_how_to_get_the_picture(tmp_path, monkeypatch):
    from tir_kernels.analysis.page.sections import field_sections

    monkeypatch.setitem(sys.modules, "scikit_posthocs", None)
    block = block_of(tmp_path, {key: {arm: 30 for arm in "abc"} for key in DATA[:3]})
    *_, last = field_sections([block], STYLES)
    assert last.title == "Ranks over data sets, 1 shot per class"
    assert 'pip install "tir_kernels[comparison]"' in last.missing
    assert last.charts == ()


@pytest.mark.slow  # pandas, statsmodels and seaborn come with the library
def test_ranks_and_tests_are_those_of_the_definitions(tmp_path):
    make_number = np.random.default_rng(0)
    tables = {
        data: {arm: int(3 * place + make_number.integers(0, 8)) for place, arm in enumerate(ARMS)}
        for data in DATA
    }
    panel, caption = ranking(block_of(tmp_path, tables), STYLES)
    means = np.array([[own[arm] / 75 for arm in ARMS] for own in tables.values()])
    mean_ranks = stats.rankdata(-means, axis=1).mean(0)
    assert [row[2] for row in panel.rows] == pytest.approx(mean_ranks)
    assert [row[0] for row in panel.rows] == [f"T: {arm}" for arm in ARMS]
    k, n = len(ARMS), len(DATA)
    error = np.sqrt(k * (k + 1) / (6 * n))
    distances = abs(mean_ranks[:, None] - mean_ranks) / error * np.sqrt(2)
    expected = stats.studentized_range.sf(distances, k, np.inf)
    assert np.array(panel.p_values) == pytest.approx(expected, abs=1e-6)
    distance = float(re.search(r"a distance of ([\d.]+) ranks", caption)[1])
    apart = np.array(panel.p_values) < 0.05
    assert apart.any()
    assert (apart == (abs(mean_ranks[:, None] - mean_ranks) > distance)).all()
    assert "p < 0.001; after it Nemenyi's test at 0.05" in caption


@pytest.mark.slow
def test_where_friedman_finds_nothing_no_two_are_told_apart(tmp_path):
    turned = [{"a": 30, "b": 31, "c": 32}, {"a": 31, "b": 32, "c": 30}, {"a": 32, "b": 30, "c": 31}]
    panel, caption = ranking(block_of(tmp_path, dict(zip(DATA, turned, strict=False))), STYLES)
    assert [row[2] for row in panel.rows] == [2, 2, 2]
    assert set(np.ravel(panel.p_values)) == {1.0}
    assert "p = 1.000, so that no two arms are told apart." in caption
    alike = {key: {arm: 30 for arm in "abc"} for key in DATA[:3]}
    _, caption = ranking(block_of(tmp_path / "alike", alike), STYLES)
    assert "p = 1.000" in caption


@pytest.mark.slow
def test_arms_without_all_episodes_are_left_out_and_counted(tmp_path):
    tables = {key: {"a": 30, "b": 31, "c": 32, "d": 75} for key in DATA[:3]}
    panel, caption = ranking(block_of(tmp_path, tables, finished={"d": [1]}), STYLES)
    assert [row[0] for row in panel.rows] == ["T: a", "T: b", "T: c"]
    assert "1 arm without all episodes of all data sets left out." in caption


@pytest.mark.slow
def test_the_picture_has_each_name_with_its_rank():
    names = ["<b>x</b>", "$a_1$", "same", "same", "of which the name is far too long for a picture"]
    rows = tuple((name, place, 1.0 + place) for place, name in enumerate(names))
    p_values = tuple(tuple(0.01 if abs(a - b) > 2 else 1.0 for a in range(5)) for b in range(5))
    chart = Chart("ranks", "Ranks", (Ranks("Mean rank", rows, p_values, 0.05),))
    drawing = draw(chart)
    (panel,) = drawing.panels
    assert "<b>" not in panel
    for text in (
        "&lt;b&gt;x&lt;/b&gt;  1.00",
        "$a_1$  2.00",
        "4.00  same",
        "same  3.00",
        "5.00  of",
    ):
        assert text in panel, text
    assert "far too long for a picture" not in panel
    assert "var(--line-0" in panel
    assert draw(chart) == drawing


@pytest.mark.slow
def test_the_page_has_the_picture_below_the_tables(tmp_path):
    tables = {data: {"a": 20 + place, "b": 30, "c": 40} for place, data in enumerate(DATA)}
    folders = [make(tmp_path, data, hits) for data, hits in tables.items()]
    page = write_page(folders, tmp_path / "all.html")
    assert sections(text_of(page))[:2] == [
        "All data sets, 1 shot per class",
        "Ranks over data sets, 1 shot per class",
    ]
    assert '<figure class="chart ranks">' in text_of(page)
    assert (tmp_path / "all-figures" / "ranks-1-shots.svg").exists()
