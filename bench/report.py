"""``python -m bench.report RESULTS.json``: its tables and targets as Markdown."""

from __future__ import annotations

from pathlib import Path

import click

from .findings import summary
from .plot import plot
from .records import Record, load_records, require_writable
from .suites import SUITES
from .tables import markdown, sections
from .targets import TARGETS


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
