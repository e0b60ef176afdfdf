"""The page on paper, in Chromium."""

import re

import browser
import pytest
from made_runs import write_run

from tir_kernels.analysis.page import write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING),
]

UPRIGHT, SIDEWAYS = 688, 1017  # pixels between the margins of A4
FOLDED = "details:not([open]) :is(table, svg, img)"
REACHING_OUT = """[...document.querySelectorAll('main *')].filter(
    each => each.getBoundingClientRect().right > innerWidth + 1
).map(each => each.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def tab(page):
    with browser.opened(page) as opened:
        yield opened


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The page of a run with as many arms as an ablation has."""
    arms = {name: "tir" for name in ("lora", *(f"tir@suppress-linear-{n}" for n in range(12)))}
    folder = tmp_path_factory.mktemp("many") / "run"
    write_run(folder, arms=arms, classes=list("abcde"), is_tracked=False)
    with browser.opened(write_page([folder], folder / "report.html")) as opened:
        yield opened


def test_what_is_folded_on_the_screen_is_printed(tab):
    are_seen = f"[...document.querySelectorAll({FOLDED!r})].map(each => each.checkVisibility())"
    tab.show(UPRIGHT, "light")
    on_screen = tab.evaluate(are_seen)
    tab.lay_out_for_paper(UPRIGHT, "light")
    assert on_screen == [False] * len(on_screen)
    assert tab.evaluate(are_seen) == [True] * len(on_screen)
    assert len(on_screen) > 5
    heights = f"[...document.querySelectorAll({FOLDED!r})].map(each => each.clientHeight)"
    assert min(tab.evaluate(heights)) >= 8  # of a legend's line


def test_nothing_is_fixed_and_nothing_reaches_over_the_margin(tab):
    tab.lay_out_for_paper(UPRIGHT, "light")
    assert tab.evaluate(REACHING_OUT) == []
    places = "[...document.querySelectorAll('*')].map(each => getComputedStyle(each).position)"
    assert not {"fixed", "sticky"} & set(tab.evaluate(places))
    scrolled = (
        "[...document.querySelectorAll('.scroll')].map(each => getComputedStyle(each).overflow)"
    )
    assert set(tab.evaluate(scrolled)) == {"visible"}


def test_tables_of_many_columns_lie_sideways_and_fit(many):
    many.lay_out_for_paper(SIDEWAYS, "light")
    assert many.evaluate("document.querySelectorAll('.wide').length") == 1
    assert many.evaluate(REACHING_OUT) == []
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", many.printed())
    are_sideways = [float(width) > float(height) for width, height in boxes]
    assert len(are_sideways) >= 2
    assert are_sideways == sorted(are_sideways), "what has room stays upright"
    assert are_sideways[-1], "settings are last"


def test_a_dark_screen_prints_as_a_light_one(tab):
    printed = []
    for scheme in ("light", "dark"):
        tab.lay_out_for_paper(UPRIGHT, scheme)
        style = "getComputedStyle(document.body)"
        assert tab.evaluate(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
        printed.append(re.sub(rb"D:\d{14}", b"", tab.printed()))
    assert len(printed[0]) > 100_000
    assert printed[0] == printed[1]
    tab.show(UPRIGHT, "dark")
    assert tab.evaluate(f"{style}.backgroundColor") != "rgb(255, 255, 255)"
