"""The page of a run: what is in it, what is said where something is missing, and its files."""

import base64
import csv
import gzip
import html
import io
import re

import pytest
from made_runs import NASTY, sections, text_of
from PIL import Image

from tir_kernels.analysis.page import page as writing
from tir_kernels.analysis.page import write_page

pytestmark = pytest.mark.slow


def test_a_tracked_run_has_all_sections(page):
    assert sections(text_of(page)) == [
        "Accuracy",
        "Arms compared",
        "Arms compared in sinks",
        "What training changes",
        "Attention sinks",
        "Relevance of simple and hard tokens",
        "Similarity of representations",
        "Norms of tokens by the number of classes that pick them",
        "Pictures of episode 0",
        "Spread of attention",
        "Outliers among tokens",
        "Other measures",
        "Settings",
    ]


def test_it_is_one_small_file_that_refers_to_nothing_else(page):
    source = text_of(page)
    assert page.stat().st_size < 1_000_000
    assert "default-src 'none'" in source
    addresses = re.findall(r"""(?:href|src)="([^"]*)\"""", source)
    addresses += re.findall(r"url\(([^)]*)\)", source)
    assert len(addresses) > 50
    assert all(each.strip("\"'").startswith(("data:", "#")) for each in addresses)
    assert not re.search(r"<(script|iframe|object|embed|form)\b", source)


def test_names_are_text(page):
    source = text_of(page)
    for name in NASTY[:4]:
        assert html.escape(name).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in source
    assert "\u202e" not in source
    assert "<b>bold" not in source
    assert "onerror=alert(1)>" not in source


def test_its_figures_lie_beside_it(page):
    folder = page.with_name("report-figures")
    names = {path.name for path in folder.iterdir()}
    assert {"accuracy.svg", "accuracy.png", "sinks-by-step.svg", "sinks-by-block.png"} <= names
    assert all(re.fullmatch(r"[a-z0-9-]+\.(svg|png)", name) for name in names)
    for path in folder.glob("*.png"):
        assert Image.open(path).width > 300


def test_data_of_figures_are_to_be_had(page):
    found = re.findall(
        r'download="sinks-by-step.csv" href="data:text/csv;base64,([^"]*)"', text_of(page)
    )
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(found[0]).decode())))
    own = [row for row in rows if row["line"] == "lora" and "patches" in row["panel"]]
    assert [float(row["at"]) for row in own] == [0, 10, 20, 30]
    assert {row["episodes"] for row in own} == {"2"}
    assert any(row["line"] == "chance" for row in rows)


def test_what_was_not_found_is_said(page):
    source = text_of(page)
    outliers = source[source.index(">Outliers among tokens<") :]
    assert outliers.index("None found.") < outliers.index("</details>")


def test_the_same_run_gives_the_same_page(page, run_folder, tmp_path):
    again = write_page([run_folder], tmp_path / "again.html")
    assert again.read_bytes() == page.read_bytes()


def test_a_page_that_would_be_too_large_leaves_parts_out_and_says_so(
    run_folder, tmp_path, monkeypatch, page
):
    size = page.stat().st_size
    monkeypatch.setattr(writing, "LARGEST", size - 1)
    packed = text_of(write_page([run_folder], tmp_path / "packed.html"))
    assert packed.count("<svg") == text_of(page).count("<svg")
    content = re.search(
        r'download="[^"]*\.csv\.gz" href="data:application/gzip;base64,([^"]*)"', packed
    )
    assert gzip.decompress(base64.b64decode(content[1])).decode().startswith("panel,line,at,")
    size = (tmp_path / "packed.html").stat().st_size
    assert size < page.stat().st_size
    monkeypatch.setattr(writing, "LARGEST", size - 1)
    smaller = text_of(write_page([run_folder], tmp_path / "smaller.html"))
    assert "Curves from block to block lie in the folder" in smaller
    assert "Pictures of episode" in smaller
    smaller_size = (tmp_path / "smaller.html").stat().st_size
    monkeypatch.setattr(writing, "LARGEST", smaller_size - 1)
    fewer = text_of(write_page([run_folder], tmp_path / "fewer.html"))
    assert "pictures are fewer" in fewer
    assert fewer.count('class="picture"') == 1 < smaller.count('class="picture"')
    monkeypatch.setattr(writing, "LARGEST", (tmp_path / "fewer.html").stat().st_size - 1)
    without = text_of(write_page([run_folder], tmp_path / "without.html"))
    assert "pictures are left out" in without
    assert "Pictures of episode" not in without
    assert "Through training" in without
    monkeypatch.setattr(writing, "LARGEST", 1)
    smallest = text_of(write_page([run_folder], tmp_path / "smallest.html"))
    assert "Figures lie in the folder" in smallest
    assert "Pictures of episode" not in smallest
    assert len(smallest) < len(smaller) < size
