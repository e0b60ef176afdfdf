"""Records as tables, and their distance from the targets, for a terminal and as Markdown.

python -m bench.report RESULTS.json
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .plot import plot
from .records import Record, case_key, load_records, require_writable
from .settings import OURS, READABLE
from .suites import SUITES
from .targets import TARGETS, Case, Target

_COLUMNS = ("shape", "implementation", "time", "/ ours", "GB/s", "TFLOP/s", "of bound", "note")
_NUMBERS = _COLUMNS[2:-1]
_OF_TARGETS = ("target", "limit", "implementation", "worst", "at", "met", "falls short at")
_SECONDS_FROM = 10_000  # milliseconds
_SHOWN_SHAPES = 4
_NARROWEST_LOG = 140


class Section(NamedTuple):
    """A table: blocks of rows that belong together."""

    title: str
    columns: tuple[str, ...]
    blocks: list[list[tuple[str, ...]]]


@dataclass(frozen=True)
class Finding:
    """A target and one implementation of ours: the value at each shape, the worst first.

    Where none was measured there are no values.
    """

    target: Target
    implementation: str
    values: list[tuple[float, Record]]

    @property
    def worst(self) -> tuple[float, Record]:
        return self.values[0]

    @property
    def falls_short_at(self) -> list[Record]:
        return [record for value, record in self.values if not self.target.is_met(value)]


def findings(records: Iterable[Record], device: str) -> list[Finding]:
    """A finding per target and backend that was measured."""
    cases: dict[tuple, Case] = {}
    for record in records:
        if record["device"] == device:
            cases.setdefault(case_key(record), {})[record["implementation"]] = record
    result: list[Finding] = []
    for target in TARGETS[device]:
        values: dict[str, list[tuple[float, Record]]] = {}
        for case in cases.values():
            for name, record in case.items():
                if name.startswith(OURS) and name != READABLE and target.concerns(record):
                    value = target.measure.of(record, case)
                    if value is not None:
                        values.setdefault(name, []).append((value, record))
        for name, found in values.items():
            found.sort(key=lambda pair: pair[0], reverse=target.measure.is_upper)
            result.append(Finding(target, name, found))
        if not values:
            result.append(Finding(target, "–", []))
    return result


def summary(records: Iterable[Record], device: str, *, only_measured: bool = False) -> Section:
    """Each target, the worst value measured, and the shapes where it falls short."""
    found = [f for f in findings(records, device) if f.values or not only_measured]
    return Section(f"Targets on {device}", _OF_TARGETS, [[_target_row(each)] for each in found])


def _target_row(finding: Finding) -> tuple[str, ...]:
    target, unit = finding.target, finding.target.measure.unit

    def shown(value: float) -> str:
        if unit == "%":
            return f"{100 * value:.0f} %"
        return f"{value:.2f}×" if unit == "×" else f"{value:.1f} {unit}"

    limit = f"{'≤' if target.measure.is_upper else '≥'} {shown(target.limit)}"
    start = (target.what, limit, finding.implementation)
    if not finding.values:
        return (*start, "not measured", "", "", "")
    value, record = finding.worst
    short = finding.falls_short_at
    met = f"{len(finding.values) - len(short)} of {len(finding.values)}"
    named = [_where(r) for r in short[:_SHOWN_SHAPES]]
    if len(short) > _SHOWN_SHAPES:
        named.append(f"and {len(short) - _SHOWN_SHAPES} more")
    return (*start, shown(value), _where(record), met, "; ".join(named) or "nowhere")


def _where(record: Record) -> str:
    return f"{record['operator']} {record['direction']} {record['dtype']} {_shape(record)}"


def _shape(record: Record) -> str:
    return " ".join(f"{name}={size}" for name, size in record["shape"].items())


def sections(records: Iterable[Record]) -> list[Section]:
    """A section per operator, direction and type; a block per shape."""
    found: dict[tuple, dict[tuple, list[Record]]] = {}
    for record in records:
        title = tuple(record[key] for key in ("suite", "operator", "direction", "dtype", "device"))
        found.setdefault(title, {}).setdefault(case_key(record), []).append(record)
    return [
        Section("{}: {}, {}, {}, {}".format(*title), _COLUMNS, list(map(_block, cases.values())))
        for title, cases in found.items()
    ]


def open_console(*, stderr: bool = False) -> Console:
    """The terminal; a file gets lines of a fixed width."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _NARROWEST_LOG
    return console


def print_sections(console: Console, found: Iterable[Section]) -> None:
    for section in found:
        table = Table(title=section.title, title_justify="left")
        for column in section.columns:
            justify = "right" if column in _NUMBERS else "left"
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
            _shape(record),
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


def report(records: list[Record]) -> str:
    """Where it was measured, the targets of each device, then every table."""
    parts = ["# Benchmark results\n"]
    found = [record.get("environment", {}) for record in records]
    environments = {tuple(sorted(facts.items())): facts for facts in found}
    for facts in environments.values():
        parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n")
    parts.append(
        "Times are medians over rounds in which the implementations took turns. Bounds come from "
        "copy bandwidth and matrix product rate measured in the same run.\n"
    )
    devices = {record["device"] for record in records}
    parts += [markdown(summary(records, device)) for device in TARGETS if device in devices]
    order = list(SUITES)
    by_suite = sorted(records, key=lambda record: order.index(record["suite"]))
    parts += [markdown(section) for section in sections(by_suite)]
    return "\n".join(parts)


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), help="A file; else it is printed.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="A PNG file.")
def main(results: Path, output: Path | None, plot_path: Path | None) -> None:
    """Write the tables and targets of a results file as Markdown."""
    records = load_records(results)
    for path in filter(None, (output, plot_path)):
        require_writable(path)
    text = report(records)
    if plot_path is not None:
        plot(records, plot_path)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text)


if __name__ == "__main__":
    main()
