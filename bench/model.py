"""``python -m bench model``: how long the CUDA attention kernels should take, without a GPU.

A model, not a measurement: expect it to be wrong by up to 30 %, and the order of a kernel's pipes
to be right. A multiprocessor's time is that of its busiest pipe, over the share of it that so many
warps keep busy. A kernel's time is that of the multiprocessor with most blocks, or of HBM where
that is longer, and a launch. Instructions are those that ``bench.sass`` counted, for bfloat16 and
heads of width 64. The relevance and statistics kernels are counted there, but not modelled. The
forward kernel's launcher chooses its plan by the same rule, with rounded numbers (forward_plan.h),
the backward kernel's by the number of its blocks (backward_plan.h).

The figures, of an H100 SXM, and where they are from:

- 132 multiprocessors, of which a block may use 227 KiB of shared memory. Each issues four
  instructions, moves 128 bytes of shared memory and takes 16 exponentials a cycle (CUDA programming
  guide; for the last, 3.9 T special functions a second, FlashAttention-3, arXiv 2407.08608).
- Tensor cores: 4096 FLOP a cycle and multiprocessor (datasheet: 989 TFLOP/s, dense). The kernels'
  ``mma.sync`` is taken to reach 62 % of that, about what arXiv 2501.12084 reports of Hopper: 1.61
  cycles for an HMMA.16816.
- L2: 24 bytes a cycle and multiprocessor, 5.5 TB/s in all; a guess after published microbenchmarks.
- HBM, as large copies: 3.0 TB/s, and 4.3 of an H200. Large products: 798 TFLOP/s, and 788. Both as
  once measured, on one machine of each; bounds follow from them.
- Clock under load: 1.755 GHz. To launch a kernel, and for its tail: 2.5 µs. Both are assumptions.
- The busiest pipe works 70 % of the time (62 to 78) with 8 warps or more on a multiprocessor, 42 %
  (36 to 48) with 4. These are assumptions, and the range that is shown.
- A block that serves a whole head, and is alone on its multiprocessor, waits for its first rows as
  long as L2 takes for them, and 800 cycles, an assumption, for HBM to begin.

Peers are estimates too. Their rates are published for an H100, heads of width 64, 16-bit types, no
mask, and 16 k tokens in all (arXiv 2407.08608, its charts of forward and backward speed). At other
lengths, rows and columns are taken to be padded to a kernel's tiles, and a launch is added. The
tiles of cuDNN are not known; they are taken to be FlashAttention-2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import click

from .bounds import shortest_ms
from .counting import attention_cost
from .launches import (
    CACHE_BYTES_PER_CYCLE,
    FORWARD,
    HEAD_DIM,
    Launch,
    Work,
    backward_plan,
    backward_work,
    forward_launch,
    forward_work,
)
from .report import Section, open_console, print_sections
from .sass.counts import blocks_per_multiprocessor, committed
from .settings import CommaSeparated
from .shapes import Point, split_heads

MULTIPROCESSORS, SHARED_MEMORY, ARCHITECTURE = 132, 227 * 1024, 90
RESERVED = 1024  # bytes of shared memory of a block that are the driver's
CLOCK = 1.755e9
LAUNCH = 2.5e-6
CYCLES_PER_PRODUCT = 1 / 0.62
ISSUED_PER_CYCLE, EXPONENTIALS_PER_CYCLE = 4, 16 / 32  # of warps

LENGTHS, HEADS = (50, 197, 257, 577), (60, 300, 768, 3072)


class Memory(NamedTuple):
    """Rates of a GPU: bytes a second of large copies, operations of large products."""

    bytes_per_second: float
    flops_per_second: float


GPUS = {"h100": Memory(3.0e12, 798e12), "h200": Memory(4.3e12, 788e12)}


class Peer(NamedTuple):
    """Rows and columns of a tile, and published TFLOP/s: direction -> {length: rate}."""

    tile: int
    rates: dict[str, dict[int, float]]


PEERS = {
    "cuDNN": Peer(128, {"forward": {512: 335, 1024: 373}, "backward": {512: 266, 1024: 348}}),
    "FA2": Peer(128, {"forward": {512: 282, 1024: 306}, "backward": {512: 198, 1024: 238}}),
    "FA3": Peer(192, {"forward": {512: 333, 1024: 392}, "backward": {512: 272, 1024: 363}}),
}


@dataclass(frozen=True)
class Share:
    """The share of the time in which the busiest pipe is busy, with 4 and with 8 warps."""

    of_four: float
    of_eight: float

    def of(self, warps: int) -> float:
        if warps <= 4:
            return self.of_four * warps / 4
        return self.of_four + (self.of_eight - self.of_four) * (min(warps, 8) - 4) / 4


LIKELY, LOW, HIGH = Share(0.42, 0.70), Share(0.36, 0.62), Share(0.48, 0.78)


def pipe_cycles(work: Work) -> dict[str, float]:
    """Cycles of a multiprocessor that each pipe takes for a block."""
    return {
        "issue": work.instructions / ISSUED_PER_CYCLE,
        "tensor": work.products * CYCLES_PER_PRODUCT,
        "EX2": work.exponentials / EXPONENTIALS_PER_CYCLE,
        "shared memory": work.shared,
        "L2": work.cache_bytes / CACHE_BYTES_PER_CYCLE,
    }


def blocks_at_once(launch: Launch, registers: int) -> int:
    """Blocks that run side by side on a multiprocessor."""
    shared = launch.shared + RESERVED
    return blocks_per_multiprocessor(registers, shared, launch.warps, ARCHITECTURE)


def grid_seconds(launch: Launch, work: Work, registers: int, share: Share) -> float:
    """The time of the multiprocessor that has most of a grid's blocks, memory aside.

    As many blocks as fit run side by side; the rest of them, fewer, leave more of its time unused.
    """
    busiest = max(pipe_cycles(work).values())
    at_once = blocks_at_once(launch, registers)
    waves, rest = divmod(-(-launch.blocks // MULTIPROCESSORS), at_once)

    def of_wave(number: int) -> float:
        waiting = work.waiting if number == 1 else 0
        return number * busiest / share.of(number * launch.warps) + waiting

    cycles = waves * of_wave(at_once) + (of_wave(rest) if rest else 0)
    return cycles / CLOCK


@dataclass(frozen=True)
class Expected:
    """A modelled time.

    Attributes:
        microseconds: With the likely share of busy pipes, and with the highest and the lowest.
        by: What takes that long: a pipe, HBM, or the launches.
        launch: Of the kernel that takes longest.
        at_once: Its blocks that run side by side on a multiprocessor.
    """

    microseconds: tuple[float, float, float]
    by: str
    launch: Launch
    at_once: int


def expect(point: Point, direction: str, memory: Memory) -> Expected:
    """The time of our attention, forward or backward without the weights' gradient.

    Args:
        point: bfloat16, heads of width 64.
        direction: "forward" or "backward".
        memory: Of the GPU.
    """
    if point.head_dim != HEAD_DIM or point.dtype != "bfloat16":
        raise ValueError(f"counts are of bfloat16 and heads of width {HEAD_DIM}, not of {point}")
    kernels, _ = committed()
    heads = point.images * point.heads
    moved, launches = attention_cost(point, direction).bytes / memory.bytes_per_second, LAUNCH
    before = 0.0
    if direction == "forward":
        kernel = kernels[FORWARD]
        launch = forward_launch(point.length, heads, MULTIPROCESSORS, SHARED_MEMORY)
        work = forward_work(kernel, point.length, heads, MULTIPROCESSORS, SHARED_MEMORY)
    else:
        plan = backward_plan(point.length, heads, MULTIPROCESSORS, SHARED_MEMORY)
        kernel, launch = kernels[plan.kernel], plan.launch
        work = backward_work(kernel, plan, point.length)
        if not plan.sweeps:
            # A kernel before it multiplies outputs with their gradients; it only reads.
            one = point.rows * point.head_dim * point.itemsize / memory.bytes_per_second
            before, moved, launches = 2 * one, moved - one, 2 * LAUNCH
    seconds = [grid_seconds(launch, work, kernel.registers, s) for s in (LIKELY, HIGH, LOW)]
    likely, fastest, slowest = (1e6 * (max(each, moved) + before + launches) for each in seconds)
    pipes = pipe_cycles(work)
    by = "HBM" if moved > seconds[0] else max(pipes, key=lambda name: pipes[name])
    if launches > max(seconds[0], moved) + before:
        by = "launch"
    at_once = blocks_at_once(launch, kernel.registers)
    return Expected((likely, fastest, slowest), by, launch, at_once)


def bound_microseconds(point: Point, direction: str, memory: Memory) -> float:
    """The time below which the useful work cannot be done."""
    return 1e3 * shortest_ms(attention_cost(point, direction), *memory)


def peer_microseconds(peer: Peer, point: Point, direction: str, memory: Memory) -> float:
    """The estimated time of unweighted attention by a published kernel."""
    padded = -(-point.length // peer.tile) * peer.tile
    rates = peer.rates[direction]
    rate = rates[max((known for known in rates if known <= padded), default=min(rates))]
    cost = attention_cost(point, direction)
    work = cost.flops * (padded / point.length) ** 2 / (rate * 1e12)
    return 1e6 * (max(work, cost.bytes / memory.bytes_per_second) + LAUNCH)


_COLUMNS = (
    "L", "B·H", "blocks × warps", "shared, at once", "model µs", "range", "by", "bound µs",
    "of bound", *(f"{name} µs" for name in PEERS),
)  # fmt: skip


def sections(lengths: tuple[int, ...], heads: tuple[int, ...], gpu: str) -> list[Section]:
    """A table per direction."""
    memory = GPUS[gpu]
    found = []
    for direction in ("forward", "backward"):
        title = f"MODEL, not a measurement, ±30 %: attention {direction}, bfloat16, d 64, {gpu}"
        blocks = [
            [_row(Point(length, HEAD_DIM, *split_heads(each), 5, "bfloat16"), direction, memory)
             for each in heads]
            for length in lengths
        ]  # fmt: skip
        found.append(Section(title, _COLUMNS, blocks))
    return found


def _row(point: Point, direction: str, memory: Memory) -> tuple[str, ...]:
    expected = expect(point, direction, memory)
    likely, fastest, slowest = expected.microseconds
    bound = bound_microseconds(point, direction, memory)
    return (
        str(point.length),
        str(point.images * point.heads),
        f"{expected.launch.blocks} × {expected.launch.warps}",
        f"{expected.launch.shared / 1024:.1f} KiB, {expected.at_once}",
        f"{likely:.1f}",
        f"{fastest:.1f}–{slowest:.1f}",
        expected.by,
        f"{bound:.1f}",
        f"{bound / likely:.0%}",
        *(f"{peer_microseconds(peer, point, direction, memory):.1f}" for peer in PEERS.values()),
    )


_NUMBERS = CommaSeparated(click.IntRange(1))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--lengths", type=_NUMBERS, default=LENGTHS, help="Token counts L.")
@click.option("--heads", type=_NUMBERS, default=HEADS, help="Products B·H.")
@click.option("--gpu", type=click.Choice(list(GPUS)), default="h100", show_default=True)
def main(lengths: tuple[int, ...], heads: tuple[int, ...], gpu: str) -> None:
    """Print how long attention should take on a GPU that need not be there.

    It is a model that is fed with counted instructions, wrong by up to 30 %. Beside it: the bound
    that copies and products set, and estimates of other kernels, without weights, from published
    rates. Its figures and their sources are in bench/model.py.
    """
    print_sections(open_console(), sections(lengths, heads, gpu))
