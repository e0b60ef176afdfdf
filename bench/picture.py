"""One picture of attention's time against length: measured on a CPU, and modelled for a GPU.

python -m bench.picture RESULTS.json docs/speed.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .model import GPUS, PEERS, Memory, bound_microseconds, expect, peer_microseconds
from .peers import COMPILED, EAGER, FLEX, MASKED, TOME, UNWEIGHTED
from .records import Record, load_records, require_writable
from .settings import DIRECTIONS, DTYPES, OURS
from .shapes import Point, split_heads

HEAD_DIM = 64
CPU = f"{OURS}cpu"
_SUITES = ("attention", "short")  # where both measured a length, the second one's time is drawn
_MODELLED = (16, 32, 50, 77, 128, 197, 257, 400, 577, 1024)
_PASSES = {"forward+backward": ("forward", "backward")}
_STYLES: dict[str, dict[str, Any]] = {
    CPU: {"color": "C3", "marker": "o", "linewidth": 2.5, "zorder": 3},
    MASKED: {"color": "C0", "marker": "s"},
    UNWEIGHTED: {"color": "C0", "marker": "s", "linestyle": ":", "fillstyle": "none"},
    FLEX: {"color": "C2", "marker": "^"},
    COMPILED: {"color": "C1", "marker": "v"},
    EAGER: {"color": "C7", "marker": "D"},
    TOME: {"color": "C4", "marker": "x"},
}
_NAMES = {CPU: "ours, weighted", EAGER: "PyTorch, eager"}


def measured(
    records: Sequence[Record], direction: str, dtype: str, heads: int
) -> dict[str, dict[int, Record]]:
    """Implementation -> {length: record} of plain shapes on a CPU, in the order of the legend.

    Raises:
        click.ClickException: No time of ours is among the records.
    """
    found: dict[str, dict[int, Record]] = {name: {} for name in _STYLES}
    wanted = {"device": "cpu", "operator": "weighted_attention", "direction": direction}
    wanted["dtype"] = dtype
    for suite in _SUITES:
        for record in records:
            shape = record["shape"]
            is_plain = set(shape) == {"B", "H", "L", "d"}
            if record["suite"] != suite or record["ms"] is None or not is_plain:
                continue
            is_wanted = all(record[name] == value for name, value in wanted.items())
            if is_wanted and (shape["B"] * shape["H"], shape["d"]) == (heads, HEAD_DIM):
                found.setdefault(record["implementation"], {})[shape["L"]] = record
    if not found[CPU]:
        raise click.ClickException(
            f"no time of {CPU} {direction} in {dtype} at B·H {heads}; measure it: python -m bench "
            f"attention short --device cpu --dtypes {dtype} --heads {heads} --json RESULTS.json"
        )
    return {name: found[name] for name in _STYLES if found[name]}


def draw(
    records: Sequence[Record], path: Path, direction: str, dtype: str, heads: int, gpu: str
) -> None:
    """Draw the picture.

    Args:
        records: Of the suites "attention" and "short" on a CPU.
        path: A PNG or SVG file.
        direction: "forward" or "forward+backward".
        dtype: The type measured on the CPU; the model is of bfloat16.
        heads: B·H on the CPU and on the GPU.
        gpu: One of the model's.

    Raises:
        click.ClickException: There is nothing to draw, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    found = measured(records, direction, dtype, heads)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_measured(left, found, f"{direction}, {dtype}, B·H {heads}, d {HEAD_DIM}")
    _draw_model(right, direction, heads, gpu)
    for axis, unit, lengths in ((left, "ms", found[CPU]), (right, "µs", _MODELLED)):
        axis.set(xscale="log", yscale="log", xlabel="tokens L", ylabel=f"time, {unit}")
        axis.minorticks_off()
        ticks = _apart(sorted(lengths))
        axis.set_xticks(ticks, labels=[str(length) for length in ticks])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"cannot write {path}: {error}") from error


def _draw_measured(axis: Any, found: dict[str, dict[int, Record]], what: str) -> None:
    for name, by_length in found.items():
        lengths = sorted(by_length)
        times = [by_length[length]["ms"] for length in lengths]
        axis.plot(lengths, times, label=_NAMES.get(name, name), markersize=4, **_STYLES[name])
    ours = {n: r for n, r in found[CPU].items() if r["fraction_of_bound"] is not None}
    lengths = sorted(ours)
    bound = [ours[n]["ms"] * ours[n]["fraction_of_bound"] for n in lengths]
    axis.plot(lengths, bound, "k--", linewidth=1, label="bound of this machine")
    facts = next(iter(found[CPU].values())).get("environment", {})
    machine = f"{facts.get('processor', 'a CPU')}, {facts.get('threads', '?')} threads"
    axis.set_title(f"CPU, measured: {machine}\n{what}", fontsize=9)


def _draw_model(axis: Any, direction: str, heads: int, gpu: str) -> None:
    lengths = _MODELLED
    memory, passes = GPUS[gpu], _PASSES.get(direction, (direction,))
    points = [Point(n, HEAD_DIM, *split_heads(heads), 5, "bfloat16") for n in lengths]
    likely, fastest, slowest = zip(*(_model(p, passes, memory) for p in points), strict=True)
    axis.fill_between(lengths, fastest, slowest, color="C3", alpha=0.2, linewidth=0)
    axis.plot(lengths, likely, color="C3", linewidth=2.5, label="ours, weighted (model, its range)")
    for index, (name, peer) in enumerate(PEERS.items()):
        times = [sum(peer_microseconds(peer, p, each, memory) for each in passes) for p in points]
        axis.plot(lengths, times, f"C{index}:", label=f"{name}, unweighted (estimate)")
    bound = [sum(bound_microseconds(p, each, memory) for each in passes) for p in points]
    axis.plot(lengths, bound, "k--", linewidth=1, label="bound")
    axis.set_title(
        f"{gpu.upper()}: MODEL, not a measurement, ±30 %\n{direction}, bfloat16, B·H {heads}, "
        f"d {HEAD_DIM}",
        fontsize=9,
    )


def _model(point: Point, passes: Sequence[str], memory: Memory) -> tuple[float, ...]:
    """Microseconds of passes one after the other: likely, at best and at worst."""
    times = (expect(point, each, memory).microseconds for each in passes)
    return tuple(map(sum, zip(*times, strict=True)))


def _apart(lengths: Sequence[int]) -> list[int]:
    """The lengths that have room for a label each on a logarithmic axis."""
    found: list[int] = []
    for length in lengths:
        if not found or length > 1.35 * found[-1]:
            found.append(length)
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
@click.option(
    "--direction",
    type=click.Choice([each for each in DIRECTIONS if each != "backward"]),
    default="forward+backward",
    show_default=True,
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--heads", type=click.IntRange(1), default=60, show_default=True, help="B·H.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True)
def main(results: Path, picture: Path, direction: str, dtype: str, heads: int, gpu: str) -> None:
    """Draw PICTURE from a results file of "python -m bench attention short --device cpu".

    On the left attention's time on the CPU against the number of tokens, ours and PyTorch's ways;
    on the right the model of bench/model.py for a GPU, which says of itself that it is a model.
    """
    require_writable(picture)
    draw(load_records(results), picture, direction, dtype, heads, gpu)


if __name__ == "__main__":
    main()
