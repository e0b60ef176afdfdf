"""The command ``report``, and the page that ends a run."""

from pathlib import Path

import fake_engine
import pytest
from command_line import assert_refused
from programs import output_of

from tir_kernels.fewshot.command import main


@pytest.fixture
def finished(arguments, tmp_path, capsys):
    assert fake_engine.run_main(arguments) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_a_run_ends_by_naming_its_page(arguments, tmp_path, capsys):
    assert fake_engine.run_main(arguments, draws_page=True) == 0
    captured = capsys.readouterr()
    path = tmp_path / "out" / "report.html"
    assert captured.out.splitlines()[-1] == f"Page: {path}"
    assert "Accuracy" in path.read_text()
    assert (tmp_path / "out" / "report-figures" / "accuracy.svg").exists()
    before = path.read_bytes()
    assert fake_engine.run_main(arguments, draws_page=True) == 0, "it replaces its own page"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("no room"), "No page: MemoryError: no room"),
        (ImportError("No module named 'matplotlib'"), "No page: ImportError: No module named"),
    ],
)
def test_a_page_that_cannot_be_drawn_fails_no_run(arguments, capsys, monkeypatch, error, line):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("tir_kernels.analysis.page.write_page", fail)
    assert fake_engine.run_main(arguments, draws_page=True) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith(line)
    assert "Traceback" not in captured.err


def test_a_page_of_others_stays_and_fails_no_run(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    own = tmp_path / "out" / "report.html"
    own.write_text("mine")
    assert fake_engine.run_main(arguments, draws_page=True) == 0
    assert "No page: --out: " in capsys.readouterr().out
    assert own.read_text() == "mine"


def test_report_writes_into_the_runs_folder_or_where_it_is_told(
    finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished / 'report.html'}\n"
    assert main(["report", str(finished), "--out", "deep/page.html"]) == 0
    assert (tmp_path / "deep" / "page.html").exists()
    assert (tmp_path / "deep" / "page-figures" / "accuracy.png").exists()
    assert main(["report", str(finished), str(finished)]) == 0
    assert (tmp_path / "report.html").exists()


def test_report_prints_tables(finished, capsys):
    parts = {
        "text": "│ tir ",
        "csv": "arm,label,episodes,",
        "markdown": "| arm |",
        "latex": r"\toprule",
    }
    for style, part in parts.items():
        assert main(["report", str(finished), "--format", style, "--baseline", "tir"]) == 0
        captured = capsys.readouterr()
        assert part in captured.out
        assert "minus tir, points" in captured.out
        assert captured.err == ""
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["--baseline", "x"], "--baseline must be one of tir, lora; got 'x'"),
        (["--format", "csv", "--out", "x"], "--out is for the page; "),
        (["--format", "xls"], "'xls'"),
    ],
)
def test_wrong_options_are_refused(finished, capsys, extra, part):
    assert_refused(capsys, ["report", str(finished), *extra], part)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert_refused(capsys, ["report"], "RUN_DIR")
    assert_refused(capsys, ["report", str(tmp_path)], "can't read ", "settings.json")
    assert_refused(capsys, ["report", str(tmp_path / "none")], "can't read ", "settings.json")


@pytest.mark.slow
def test_the_command_line_waits_for_no_library_of_pages():
    program = (
        "import sys, tir_kernels.fewshot.command\n"
        "slow = {'torch', 'matplotlib', 'jinja2', 'scipy', 'numpy'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert output_of(program, cwd=root) == "[]"
