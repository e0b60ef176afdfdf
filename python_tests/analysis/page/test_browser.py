"""The page as a reader has it before them, in Chromium."""

import io

import browser
import pytest
from made_runs import ARMS, write_run
from PIL import Image

from tir_kernels.analysis.page import write_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING),
]

SCREENS = [(375, "light"), (375, "dark"), (1280, "light"), (1280, "dark")]


@pytest.fixture(scope="module")
def tab(page):
    with browser.opened(page) as opened:
        yield opened


def test_nothing_is_said_in_the_console_and_nothing_is_asked_of_the_network(tab, page):
    tab.show(1280, "light")
    assert tab.evaluate("document.querySelectorAll('svg[role=img]').length") > 5
    for method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        assert tab.told(method) == []
    asked = [each["request"]["url"] for each in tab.told("Network.requestWillBeSent")]
    assert page.resolve().as_uri() in asked
    others = {url for url in asked if url != page.resolve().as_uri()}
    assert all(url.startswith("data:") for url in others), others


def test_names_made_no_elements(tab):
    for made in ("script", "b", "i", "img[src=x]", "[onerror]", "iframe"):
        assert tab.evaluate(f"document.querySelectorAll({made!r}).length") == 0, made
    assert "<script>alert(1)</script>" in tab.evaluate("document.body.innerText")


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_screens_show_something_and_do_not_scroll_sideways(tab, width, scheme):
    tab.show(width, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    reaching_out = """[...document.querySelectorAll('main *')].filter(
        each => !each.closest('.scroll > *') && each.getBoundingClientRect().right > innerWidth + 1
    ).map(each => each.outerHTML.slice(0, 80))"""
    assert tab.evaluate(reaching_out) == []
    image = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
    assert image.width == width
    assert image.height > 2000
    colours = image.getcolors(2**24)
    assert len(colours) > 500
    _, paper = max(colours)
    assert (min(paper) > 230) if scheme == "light" else (max(paper) < 50)


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """The page of three data sets with a quoted table and a diagram, and names that are nasty."""
    root = tmp_path_factory.mktemp("field")
    arms = {**ARMS, "_<img src=x onerror=alert(1)>$a$": "tip-adapter"}
    folders = [
        write_run(root / data, arms=arms, classes=list("abcde"), is_tracked=False, data=data)
        for data in ("eurosat", "isic2018", "chestx")
    ]
    with browser.opened(write_page(folders, root / "all.html")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "scheme"), [(375, "dark"), (1280, "light")])
def test_many_data_sets_do_not_scroll_sideways_either(field, width, scheme):
    field.show(width, scheme)
    assert field.evaluate("document.documentElement.scrollWidth") <= width
    assert field.evaluate("document.querySelectorAll('img').length") == 0
    diagram = "document.querySelector('.ranks svg').getBoundingClientRect().width"
    assert 200 < field.evaluate(diagram) < width
    style = "getComputedStyle(document.querySelector('{}')).color"
    quoted = field.evaluate(style.format(".quoted td"))
    assert quoted == field.evaluate(style.format(".note"))
    assert quoted != field.evaluate(style.format("figure:not(.quoted) td"))


def test_text_stands_out_from_the_page_in_both_schemes(tab):
    """By the contrast that WCAG asks of text, 4.5; of lines, 3."""
    for scheme in ("light", "dark"):
        tab.show(1280, scheme)
        names = ["ink", "muted", "card", *(f"line-{number}" for number in range(6))]
        style = "getComputedStyle(document.documentElement).getPropertyValue"
        found = {name: tab.evaluate(f"{style}('--{name}')") for name in names}
        card = luminance(found.pop("card"))
        for name, colour in found.items():
            low, high = sorted([card, luminance(colour)])
            contrast = (high + 0.05) / (low + 0.05)
            assert contrast >= (3 if name.startswith("line") else 4.5), (scheme, name, contrast)


def luminance(colour):
    channels = [int(colour.strip()[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
