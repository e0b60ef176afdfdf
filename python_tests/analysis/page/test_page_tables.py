"""Tables in each format: names that would break or command another program are harmless."""

import csv
import io

import pytest
from made_runs import NASTY

from tir_kernels.analysis.page.tables import FORMATS, Table, Value, shown, titled, written
from tir_kernels.fewshot import report_command
from tir_kernels.fewshot.run.summary import Estimate

HALF = Value(Estimate.of([0.2, 0.4, 0.6]), scale=100, digits=1)
LESS = Value(Estimate.of([-0.2, -0.4]), scale=100, digits=1, is_signed=True)


def table_of(*names):
    return Table("Names", ("arm", "mean, %"), tuple((name, HALF) for name in names))


def read_csv(text):
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.parametrize("sign", "=+-@")
def test_csv_cells_are_no_formulas(sign):
    for name in (f"{sign}1+1", f" {sign}cmd|' /C calc'!A0"):
        _, row = read_csv(written(table_of(name), "csv"))
        assert row[0] == f"'{name}"


def test_a_mean_and_its_interval_are_two_numbers_in_csv():
    head, row, other = read_csv(written(Table("", ("arm", "x"), (("a", LESS), ("b", 3))), "csv"))
    assert head == ["arm", "x", "x: half of the 95 % interval"]
    assert [float(cell) for cell in row[1:]] == pytest.approx([-30, 127.1], abs=0.1)
    assert other == ["b", "3", ""]


def test_csv_keeps_names_with_commas_quotes_and_line_ends():
    name = 'a,"b"\nc'
    _, row = read_csv(written(table_of(name), "csv"))
    assert row[0] == 'a,"b"\\nc'


def test_markdown_has_a_cell_for_each_column_whatever_the_names():
    lines = written(table_of(*NASTY, "a|b", "*x*", "`c`"), "markdown").splitlines()[2:]
    for line in lines:
        assert line.replace(r"\|", "").count("|") == 3, line
    assert "<script" not in "".join(lines)
    assert r"a\|b" in lines[-3]
    assert r"\*x\*" in lines[-2]


def test_latex_escapes_what_it_would_carry_out():
    text = written(table_of(r"\input{/etc/passwd}", "50% & $x_1$ #", "[1]"), "latex")
    assert r"\textbackslash{}input\{/etc/passwd\}" in text
    assert r"50\% \& \$x\_1\$ \#" in text
    assert "\n  {}[1] &" in text
    assert text.count(r"\\") == 4
    assert r"40.0 $\pm$ 49.7" in text


def test_titles_are_comments_of_one_line_in_latex():
    text = written(Table("a\nb\\end{x}", ("c",), ()), "latex")
    assert text.splitlines()[0].startswith("% a")
    assert text.splitlines()[1].startswith("\\begin")


def test_cells_say_that_none_was_found():
    assert shown(None) == shown(Value(Estimate.of([]))) == "none found"
    assert shown(Value(Estimate.of([0.5]))) == "0.500 (no interval)"
    assert shown(LESS).startswith("−30.0 ± ")
    assert shown("\u202egnp") == "\\u202egnp"


def test_several_tables_have_titles():
    tables = [table_of("a"), table_of("b")]
    assert titled(tables, "csv").count("Names\n") == 2
    assert titled(tables, "markdown").count("**Names**") == 2


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format must be one of csv, markdown, latex; got 'xls'"):
        written(table_of("a"), "xls")
    assert ("text", *FORMATS) == report_command.FORMATS
