"""``python -m bench model``: the tables of how long the CUDA kernels should take, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import click

from .backward_launches import WIDTHS
from .bounds import shortest_ms
from .counting import NUMBER_BYTES, Cost, relevance_cost, statistics_cost
from .hopper import expect_with_wgmma
from .launches import HEAD_DIM
from .model import (
    GPUS,
    PEERS,
    Expected,
    Memory,
    bound_microseconds,
    expect,
    expect_relevance,
    expect_selection,
    expect_statistics,
    peer_microseconds,
)
from .report import Section, open_console, print_sections
from .settings import CommaSeparated
from .shapes import MODEL_HEADS, Point, split_heads

LENGTHS, HEADS, IMAGES = (50, 197, 257, 577), (60, 300, 768, 3072), (5, 25, 64)
TOKEN_LENGTH = 197  # of the tables of what goes before attention

_COMMON = ("blocks × warps", "shared, at once", "model µs", "range", "by", "bound µs", "of bound")
_COLUMNS = ("L", "B·H", *_COMMON, *(f"{name} µs" for name in PEERS))
_TOKEN_COLUMNS = ("", "B", *_COMMON)
_HOPPER_COLUMNS = ("L", "B·H", *_COMMON, "ours µs", "gain")
_WARNING = "MODEL, not a measurement, ±30 %"


def sections(lengths: tuple[int, ...], heads: tuple[int, ...], gpu: str) -> list[Section]:
    """A table per direction of attention."""
    memory = GPUS[gpu]
    found = []
    for direction in ("forward", "backward"):
        title = f"{_WARNING}: attention {direction}, bfloat16, d 64, {gpu}"
        blocks = [
            [_row(Point(length, HEAD_DIM, *split_heads(each), 5, "bfloat16"), direction, memory)
             for each in heads]
            for length in lengths
        ]  # fmt: skip
        found.append(Section(title, _COLUMNS, blocks))
    return found


def wide_section(lengths: tuple[int, ...], heads: tuple[int, ...], gpu: str) -> Section:
    """A table of the backward pass of wider heads."""
    memory, width = GPUS[gpu], max(WIDTHS)
    blocks = []
    for length in lengths:
        points = [Point(length, width, *split_heads(each), 5, "bfloat16") for each in heads]
        blocks.append([_own_cells(point, "backward", memory) for point in points])
    title = f"{_WARNING}: attention backward, bfloat16, d {width}, {gpu}"
    return Section(title, ("L", "B·H", *_COMMON), blocks)


def hopper_section(lengths: tuple[int, ...], heads: tuple[int, ...], gpu: str) -> Section:
    """A table of the forward kernel that is not written, beside the one that is."""
    memory = GPUS[gpu]
    blocks = []
    for length in lengths:
        rows = []
        for each in heads:
            point = Point(length, HEAD_DIM, *split_heads(each), 5, "bfloat16")
            expected = expect_with_wgmma(point, memory)
            today = expect(point, "forward", memory).microseconds[0]
            cells = _cells(expected, bound_microseconds(point, "forward", memory))
            gain = f"{today / expected.microseconds[0]:.2f}"
            rows.append((str(length), str(each), *cells, f"{today:.1f}", gain))
        blocks.append(rows)
    title = f"{_WARNING}: forward with wgmma and TMA, NOT WRITTEN, bfloat16, d 64, {gpu}"
    return Section(title, _HOPPER_COLUMNS, blocks)


def token_section(images: tuple[int, ...], gpu: str) -> Section:
    """A table of what goes before attention, and of attention's statistics: of ViT-B/16."""
    memory = GPUS[gpu]
    of_float = memory._replace(flops_per_second=memory.flops_per_second / 6)
    points = [Point(TOKEN_LENGTH, HEAD_DIM, each, MODEL_HEADS, 5, "bfloat16") for each in images]
    blocks = []
    for name in ("relevance, bfloat16", "relevance, float32", "selection", "statistics"):
        rows = []
        for point in points:
            rates = memory
            if name == "selection":
                expected, cost = expect_selection(point), _selection_cost(point)
            elif name == "statistics":
                expected, cost = expect_statistics(point, memory), statistics_cost(point)
            else:
                point = replace(point, dtype=name.split()[-1])
                rates = of_float if point.dtype == "float32" else memory
                expected, cost = expect_relevance(point, memory), relevance_cost(point)
            bound = 1e3 * shortest_ms(cost, *rates)
            rows.append((name, str(point.images), *_cells(expected, bound)))
        blocks.append(rows)
    title = f"{_WARNING}: before attention, L {TOKEN_LENGTH}, D 768, E 512, 5 classes, {gpu}"
    return Section(title, _TOKEN_COLUMNS, blocks)


def _selection_cost(point: Point) -> Cost:
    """Relevance in, counts out."""
    return Cost(point.images * point.patches * (point.num_classes + 1) * NUMBER_BYTES, 0)


def _row(point: Point, direction: str, memory: Memory) -> tuple[str, ...]:
    return (
        *_own_cells(point, direction, memory),
        *(f"{peer_microseconds(peer, point, direction, memory):.1f}" for peer in PEERS.values()),
    )


def _own_cells(point: Point, direction: str, memory: Memory) -> tuple[str, ...]:
    bound = bound_microseconds(point, direction, memory)
    found = _cells(expect(point, direction, memory), bound)
    return (str(point.length), str(point.images * point.heads), *found)


def _cells(expected: Expected, bound: float) -> tuple[str, ...]:
    likely, fastest, slowest = expected.microseconds
    return (
        f"{expected.launch.blocks} × {expected.launch.warps}",
        f"{expected.launch.shared / 1024:.1f} KiB, {expected.at_once}",
        f"{likely:.1f}",
        f"{fastest:.1f}–{slowest:.1f}",
        expected.by,
        f"{bound:.1f}",
        f"{bound / likely:.0%}",
    )


_NUMBERS = CommaSeparated(click.IntRange(1))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--lengths", type=_NUMBERS, default=LENGTHS, help="Token counts L.")
@click.option("--heads", type=_NUMBERS, default=HEADS, help="Products B·H.")
@click.option("--images", type=_NUMBERS, default=IMAGES, help="Images B, of what goes before.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True)
def main(
    lengths: tuple[int, ...], heads: tuple[int, ...], images: tuple[int, ...], gpu: str
) -> None:
    """Print how long attention, and what goes before it, should take on a GPU not there.

    It is a model that is fed with counted instructions, wrong by up to 30 %. Beside it: the bound
    that copies and products set, and estimates of other kernels, without weights, from published
    rates. Its figures and their sources are in bench/model.py. The last table is of a kernel that
    is not written: bench/hopper.py.
    """
    tables = [
        *sections(lengths, heads, gpu),
        wide_section(lengths, heads, gpu),
        token_section(images, gpu),
        hopper_section(lengths, heads, gpu),
    ]
    print_sections(open_console(), tables)
