"""Records as tables, for a terminal and for a Markdown file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .records import Record, case_key
from .settings import OURS

_COLUMNS = ("shape", "implementation", "time", "/ ours", "GB/s", "TFLOP/s", "of bound", "note")
_SECONDS_FROM = 10_000  # milliseconds
_NUMBERS = frozenset(_COLUMNS[2:-1])


@dataclass
class Section:
    """A table: blocks of rows that belong together."""

    title: str
    columns: Sequence[str]
    numbers: frozenset[str] = frozenset()  # columns of numbers
    blocks: list[list[tuple[str, ...]]] = field(default_factory=list)


def sections(records: Iterable[Record]) -> list[Section]:
    """A section per operator, direction and type; a block per shape."""
    found: dict[tuple, dict[tuple, list[Record]]] = {}
    for record in records:
        title = tuple(record[key] for key in ("suite", "operator", "direction", "dtype", "device"))
        found.setdefault(title, {}).setdefault(case_key(record), []).append(record)
    return [
        Section(
            "{}: {}, {}, {}, {}".format(*title),
            _COLUMNS,
            _NUMBERS,
            [_block(block) for block in cases.values()],
        )
        for title, cases in found.items()
    ]


def shape_text(record: Record) -> str:
    return " ".join(f"{name}={size}" for name, size in record["shape"].items())


def print_sections(console: Console, found: Iterable[Section]) -> None:
    for section in found:
        table = Table(title=section.title, title_justify="left")
        for column in section.columns:
            justify = "right" if column in section.numbers else "left"
            table.add_column(column, justify=justify, overflow="fold")
        for block in section.blocks:
            for row in block:
                table.add_row(*map(escape, row))
            table.add_section()
        console.print(table)


def markdown(section: Section) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [row for block in section.blocks for row in block]
    lines = [line(section.columns), "|" + "---|" * len(section.columns), *map(line, rows)]
    return f"### {section.title}\n\n" + "\n".join(lines) + "\n"


def _block(records: list[Record]) -> list[tuple[str, ...]]:
    """One shape's rows; times are also given relative to the fastest of ours."""
    ours = [
        r["ms"] for r in records if r["implementation"].startswith(OURS) and r["ms"] is not None
    ]
    fastest = min(ours, default=None)
    return [
        (
            shape_text(record),
            record["implementation"],
            _amount(record),
            "" if fastest is None or record["ms"] is None else f"{record['ms'] / fastest:.2f}",
            _number(record["gbps"], "{:.1f}"),
            _number(record["tflops"], "{:.2f}"),
            _number(record["fraction_of_bound"], "{:.0%}"),
            _note(record),
        )
        for record in records
    ]


def _amount(record: Record) -> str:
    if record.get("mib") is not None:
        return f"{record['mib']:.1f} MiB"
    if record["ms"] is None:
        return "–"
    if record["ms"] >= _SECONDS_FROM:
        return f"{record['ms'] / 1e3:.2f} s"
    if record["ms"] < 0.1:
        return f"{record['ms'] * 1e3:.1f} µs"
    return f"{record['ms']:.3f} ms"


def _note(record: Record) -> str:
    if "wrong" in record:
        return f"WRONG: {record['wrong']}"
    if "accuracy" in record:
        return (
            f"{record['episodes_per_hour']:.0f} episodes an hour; accuracy of "
            f"{record['episodes']}: {record['accuracy']:.1%}"
        )
    reason = record.get("skipped") or record.get("unavailable")
    return f"skipped: {reason}" if reason else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
