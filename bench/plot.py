"""Time against length and against batch, with the bound drawn in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import click

from .records import Record

_MARKERS = "osv^Dp*hX<>d"
_MODELS = ("step", "savings", "episodes")  # suites that measure one model, not a range of lengths


def plot(records: Iterable[Record], path: Path) -> bool:
    """Draw the records that have a time and a bound; False if there are none.

    Each row of the figure is an operator, direction and type: on the left time against L, on the
    right against B·H (against B where there are no heads), at the sizes measured most often.

    Raises:
        click.ClickException: Matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.ClickException("--plot needs Matplotlib: pip install -e '.[bench]'") from error
    rows: dict[tuple, list[Record]] = {}
    for record in records:
        if record["fraction_of_bound"] is not None and record["suite"] not in _MODELS:
            key = (record["operator"], record["direction"], record["dtype"], record["device"])
            rows.setdefault(key, []).append(record)
    if not rows:
        return False
    figure = Figure(figsize=(13, 4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for axes, (key, found) in zip(grid, rows.items(), strict=True):
        by_length = _most_measured(found, _batch)
        by_batch = _most_measured(found, lambda record: record["shape"]["L"])
        has_heads = "H" in found[0]["shape"]
        title = "{}, {}, {}, {}".format(*key)
        _draw(axes[0], by_length, lambda record: record["shape"]["L"], "L", title)
        _draw(axes[1], by_batch, _batch, "B·H" if has_heads else "B", title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"--plot: cannot write {path}: {error}") from error
    return True


def _batch(record: Record) -> int:
    return record["shape"]["B"] * record["shape"].get("H", 1)


def _other_sizes(record: Record) -> tuple:
    """Sizes that neither axis shows."""
    return tuple(sorted((n, s) for n, s in record["shape"].items() if n not in ("B", "H", "L")))


def _most_measured(records: list[Record], fixed) -> list[Record]:
    """The records that agree in ``fixed`` and in the sizes not shown, for the commonest values."""
    counts = Counter((fixed(record), _other_sizes(record)) for record in records)
    commonest = counts.most_common(1)[0][0]
    return [r for r in records if (fixed(r), _other_sizes(r)) == commonest]


def _draw(axis, records: list[Record], size, label: str, title: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    bound: dict[int, float] = {}
    for record in records:
        lines.setdefault(record["implementation"], []).append((size(record), record["ms"]))
        bound[size(record)] = record["ms"] * record["fraction_of_bound"]
    for index, (name, found) in enumerate(lines.items()):
        marker = _MARKERS[index % len(_MARKERS)]
        axis.plot(*zip(*sorted(found), strict=True), marker=marker, label=name)
    axis.plot(*zip(*sorted(bound.items()), strict=True), "k--", label="bound")
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
    sizes = " ".join(f"{name}={value}" for name, value in _other_sizes(records[0]))
    fixed = f"L={records[0]['shape']['L']}" if label != "L" else f"B·H={_batch(records[0])}"
    axis.set_title(f"{title}\n{fixed} {sizes}", fontsize=9)
    axis.set_xticks(sorted(bound), labels=[str(s) for s in sorted(bound)])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
