"""Figures: what they show, whose colours they take, and what they leave alone."""

import io
import itertools
import re
from xml.etree import ElementTree

import matplotlib
import pytest
from PIL import Image

from tir_kernels.analysis.figures import INK, Chart, Dots, Line, Lines, Point, draw
from tir_kernels.analysis.figures.styles import ARMS, SCALE, dashes, shade
from tir_kernels.fewshot.run.summary import Estimate

NAMES = ["_hidden", "<script>x()</script>", "$x_1$ & \\frac", "森 \u202egnp", "a" * 99]


def line(name, style, values=((0, 0.1, 0.2), (10, 0.2, 0.4))):
    points = tuple(Point(x, Estimate.of(own)) for x, *own in values)
    return Line(name, style, points)


def chart(names=NAMES, **changes):
    lines = tuple(line(name, number) for number, name in enumerate(names))
    panel = Lines("share <b>& more</b>", "step", lines, ((0, 0.05), (10, 0.05)))
    legend = tuple((name, number) for number, name in enumerate(names))
    return Chart("shares", "Shares", (panel,), legend)._replace(**changes)


def texts(source):
    found = ElementTree.fromstring(source).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(each.itertext()) for each in found]


def test_names_are_shown_as_they_are_and_do_nothing():
    source = draw(chart()).svg.decode()
    shown = texts(source)
    for name in NAMES[:3]:
        assert name in shown
    assert "森 \\u202egnp" in shown
    assert "a" * 23 + "…" in shown
    assert "<script" not in source
    for element in ElementTree.fromstring(source).iter():
        assert element.tag.split("}")[1] not in ("script", "image", "a", "foreignObject")


def test_a_pages_panel_takes_its_colours_from_the_page():
    source = draw(chart(names=["one", "two"])).panels[0]
    for colour in re.findall(r"#[0-9a-f]{6}\b", source):
        assert f", {colour})" in source, "only behind a custom property"
    assert "var(--line-0, #0072b2)" in source
    assert "var(--line-1" in source
    assert "var(--muted" in source
    assert 'role="img" aria-label="share &lt;b&gt;' in source
    assert "<style" not in source
    assert "<metadata" not in source
    ids = re.findall(r' id="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    assert all(f"#{each}" in source for each in ids)


def test_panels_of_two_charts_share_no_identifiers():
    one, other = (draw(chart(name=name)).panels[0] for name in ("one", "other"))
    found = [set(re.findall(r' id="([^"]+)"', source)) for source in (one, other)]
    assert found[0]
    assert not found[0] & found[1]


def test_the_same_numbers_give_the_same_bytes_and_leave_settings_alone():
    first = draw(chart())
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.fonttype": "path"}):
        assert draw(chart()) == first
        assert matplotlib.rcParams["font.size"] == 30
    assert dict(matplotlib.rcParams) == before


def test_png_has_white_paper():
    image = Image.open(io.BytesIO(draw(chart()).png)).convert("RGB")
    assert image.getpixel((1, 1)) == (255, 255, 255)
    assert len(image.getcolors(2**20)) > 20


def test_a_panel_without_values_says_so():
    empty = Lines("x", "step", (line("one", 0, values=((0,), (10,))),))
    assert empty.is_empty
    assert "none found" in texts(draw(chart(panels=(empty,))).svg)


def test_dots_name_their_rows():
    rows = tuple((name, 0, (0.2, 0.4), Estimate.of([0.2, 0.4])) for name in ("one", "$2$"))
    shown = texts(draw(chart(panels=(Dots("x", "%", rows, 0.2),))).panels[0])
    assert {"one", "$2$", "%"} <= set(shown)


def test_panels_on_a_scale_share_their_axis():
    low = Lines("low", "block", (line("0", 0, ((0, 1.0), (1, 2.0))),))
    high = Lines("high", "block", (line("1", 1, ((0, 90.0), (1, 100.0))),))
    ordered = chart(panels=(low, high), legend=(("0", 0), ("1", 1)), is_ordered=True)
    ticks = [texts(panel) for panel in draw(ordered).panels]
    assert len(ticks[0]) > 3
    assert ticks[0] == ticks[1]


def test_lines_differ_in_dashes_where_they_share_a_colour():
    looks = [(shade(n, 0, False), str(dashes(n, False))) for n in range(3 * len(ARMS))]
    assert len(set(looks)) == len(looks)
    assert all(one[1] != two[1] for one, two in itertools.pairwise(looks))
    assert shade(INK, 0, False).name == "ink"


@pytest.mark.parametrize("total", [2, 6, 11])
def test_counts_go_from_one_end_of_the_scale_to_the_other(total):
    found = [shade(n, total, True) for n in range(total)]
    assert (found[0], found[-1]) == (SCALE[0], SCALE[-1])
