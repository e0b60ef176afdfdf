"""Tables of a report, and one function that writes them as CSV, Markdown or LaTeX."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tir_kernels.fewshot.run.summary import Estimate
from tir_kernels.text import printable

FORMATS = {"csv": "csv", "markdown": "md", "latex": "tex"}  # and the ending of such a file

NONE_FOUND = "none found"


class Value(NamedTuple):
    """A mean with its interval, as it is shown.

    Attributes:
        estimate: Mean and interval.
        scale: Factor of both, such as 100 for per cent.
        digits: Digits behind the point.
        is_signed: Whether positive numbers have a sign, as differences do.
        place: 1 for the best of its column, 2 for the second best, 0 for no mark.
        tells_episodes: Whether the number of episodes stands beside it.
    """

    estimate: Estimate
    scale: float = 1.0
    digits: int = 3
    is_signed: bool = False
    place: int = 0
    tells_episodes: bool = False

    @property
    def numbers(self) -> tuple[str, str]:
        """Mean and half of the interval's width; empty where there is none."""
        mean, half_width = self.estimate.mean, self.estimate.half_width
        sign = "+" if self.is_signed else ""
        return (
            "" if mean is None else f"{self.scale * mean:{sign}.{self.digits}f}",
            "" if half_width is None else f"{self.scale * half_width:.{self.digits}f}",
        )

    def __str__(self) -> str:
        mean, half_width = self.numbers
        if not mean:
            return NONE_FOUND
        # A sign as wide as the plus, and no break between the two.
        mean = mean.replace("-", "−")
        text = f"{mean} ± {half_width}" if half_width else f"{mean} (no interval)"
        return f"{text} (n = {self.estimate.episodes})" if self.tells_episodes else text


class PValue(float):
    """A p value, which readers need to three digits."""

    @property
    def relation(self) -> str:
        """It as the end of "p …"."""
        return "< 0.001" if self < 0.001 else f"= {self:.3f}"

    def __str__(self) -> str:
        return self.relation.removeprefix("= ")


Cell = str | int | float | Value | None


class Table(NamedTuple):
    """Rows under headings.

    Attributes:
        title: Subject.
        columns: Headings; the first is that of the rows' names.
        rows: As many cells each; ``None`` is shown as "none found".
        notes: Sentences that the reader needs.
        is_quoted: Whether the numbers are from papers: such a table is grey and stands apart.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    is_quoted: bool = False


def shown(cell: Cell) -> str:
    """A cell's text for readers."""
    if cell is None:
        return NONE_FOUND
    if isinstance(cell, float) and not isinstance(cell, PValue):
        return f"{cell:.4g}"
    return printable(str(cell))


def place_of(cell: Cell) -> int:
    """1 for the best of a column, 2 for the second best, 0 for all else."""
    return cell.place if isinstance(cell, Value) else 0


def written(table: Table, style: str) -> str:
    """A table as text for other programs.

    Args:
        table: The table.
        style: "csv" (a mean and its interval are two columns, the number of episodes a third where
            it is told, and nothing can be taken for a formula), "markdown" or "latex" (for the
            packages booktabs and, where numbers are quoted, xcolor).

    Raises:
        ValueError: There is no such style.
    """
    if style == "csv":
        return _csv(table)
    heads = [printable(column) for column in table.columns]
    if style == "markdown":
        names = [*map(_markdown, heads)]
        cells = [[_marked(cell, _markdown, _MARKDOWN_MARKS) for cell in row] for row in table.rows]
        rule = ["---", *["---:"] * (len(heads) - 1)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (names, rule, *cells))
        notes = "".join(f"\n{_markdown(note)}\n" for note in table.notes)
        return f"**{_markdown(table.title)}**\n\n{body}\n{notes}"
    if style == "latex":
        rows = [[_marked(cell, _latex, _LATEX_MARKS) for cell in row] for row in table.rows]
        top, *lines = [f"  {' & '.join(line)} \\\\" for line in ([*map(_latex, heads)], *rows)]
        grey = ["\\begingroup\\color{gray}"] if table.is_quoted else []
        return "\n".join(
            [
                *(f"% {_one_line(text)}" for text in (table.title, *table.notes)),
                *grey,
                f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
                "  \\toprule",
                top,
                "  \\midrule",
                *lines,
                "  \\bottomrule",
                "\\end{tabular}",
                *(["\\endgroup"] if grey else []),
                "",
            ]
        )
    raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {style!r}")


def _marked(cell: Cell, escape: Callable[[str], str], marks: Sequence[str]) -> str:
    """A cell's text, marked if it is the best of its column or the second best."""
    text, place = escape(shown(cell)), place_of(cell)
    return marks[place - 1].replace("TEXT", text) if place else text


def _csv(table: Table) -> str:
    widths = [
        max((_csv_width(row[number]) for row in table.rows), default=1)
        for number in range(len(table.columns))
    ]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    heads: list[str] = []
    for column, width in zip(table.columns, widths, strict=True):
        parts = (column, f"{column}: half of the 95 % interval", f"{column}: episodes")
        heads += parts[:width]
    writer.writerow(map(_no_formula, heads))
    for row in table.rows:
        cells: list[str] = []
        for cell, width in zip(row, widths, strict=True):
            own = [_csv_cell(cell)]
            if isinstance(cell, Value):
                own = [*cell.numbers, str(cell.estimate.episodes)]
            cells += [*own, "", ""][:width]
        writer.writerow(cells)
    return file.getvalue()


def _csv_width(cell: Cell) -> int:
    """The number of columns for a cell: of its mean, interval and number of episodes."""
    return (3 if cell.tells_episodes else 2) if isinstance(cell, Value) else 1


def _csv_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return _no_formula(cell)
    return "" if cell is None else f"{cell:.9g}" if isinstance(cell, float) else str(cell)


def _no_formula(text: str) -> str:
    """Text that a spreadsheet does not compute, whoever has chosen the name in it."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(("=", "+", "-", "@", "|", "%")) else text


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*_{}\[\]()#+!|~$-])", r"\\\1", _one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "ε": r"$\varepsilon$",
    "σ": r"$\sigma$",
    **{char: f"\\{char}" for char in "{}$&#_%"},
}


_MARKDOWN_MARKS = ("**TEXT**", "<u>TEXT</u>")
_LATEX_MARKS = (r"\textbf{TEXT}", r"\underline{TEXT}")


def _latex(text: str) -> str:
    # A row may not begin with a bracket, which the line break before it would take.
    text = "".join(_LATEX.get(char, char) for char in _one_line(text))
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def download(content: str | bytes, kind: str) -> str:
    """A ``data:`` address of a file that the page carries in itself.

    Args:
        content: The file.
        kind: Its media type.
    """
    raw = content.encode() if isinstance(content, str) else content
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def titled(tables: Sequence[Table], style: str) -> str:
    """Several tables in one text; in CSV, each has its title in a line above."""
    if style == "csv" and len(tables) > 1:
        return "\n".join(f"{_csv_title(table)}\n{written(table, style)}" for table in tables)
    return "\n".join(written(table, style) for table in tables)


def _csv_title(table: Table) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow([_no_formula(table.title)])
    return file.getvalue()
