"""How long the CUDA kernels should take, without a GPU.

A model, not a measurement: expect it to be wrong by up to 30 %, and the order of a kernel's pipes
to be right. A multiprocessor's time is that of its busiest pipe, over the share of it that so many
warps keep busy. A kernel's time is that of the multiprocessor with most blocks, or of HBM where
that is longer, and a launch. Instructions are those that ``bench.sass`` counted, for bfloat16 and
heads of width 64, backward of width 80 too; those of relevance are of float32 too. The launchers of
both directions choose their plans by the same rule, with rounded numbers (makespan.h,
forward_plan.h, backward_plan.h).

The figures, of an H100 SXM, and where they are from:

- 132 multiprocessors, of which a block may use 227 KiB of shared memory. Each issues four
  instructions, moves 128 bytes of shared memory and takes 16 exponentials a cycle (CUDA programming
  guide; for the last, 3.9 T special functions a second, FlashAttention-3, arXiv 2407.08608).
- Tensor cores: 4096 FLOP a cycle and multiprocessor (datasheet: 989 TFLOP/s, dense). The kernels'
  ``mma.sync`` is taken to reach 62 % of that, about what arXiv 2501.12084 reports of Hopper: 1.61
  cycles for an HMMA.16816, and as many for an HMMA.1688 of TF32, at half the rate. float32 takes
  three of the latter for a product, so the bound on its work is a sixth of the rate of bfloat16.
- L2: 24 bytes a cycle and multiprocessor, 5.5 TB/s in all; a guess after published microbenchmarks.
- HBM, as large copies: 3.0 TB/s, and 4.3 of an H200. Large products: 798 TFLOP/s, and 788. Both as
  once measured, on one machine of each; bounds follow from them.
- Clock under load: 1.755 GHz. To launch a kernel, and for its tail: 2.5 µs. Both are assumptions.
- The busiest pipe works 70 % of the time (62 to 78) with 8 warps or more on a multiprocessor, 42 %
  (36 to 48) with 4. These are assumptions, and the range that is shown.
- Selection is a search that a warp does alone, and busies no pipe. To issue its instructions takes
  2 cycles each (1.5 to 3), a sum over a warp 30, and to get to it and away from it 1000, since
  memory has to be waited for twice. All are assumptions.
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

from .backward_launches import WIDTHS, BackwardPlan, backward_plan, backward_work
from .bounds import shortest_ms
from .counting import attention_cost, relevance_cost, statistics_cost
from .launches import (
    CACHE_BYTES_PER_CYCLE,
    FORWARD,
    HEAD_DIM,
    STATISTICS,
    Launch,
    Work,
    forward_launch,
    forward_work,
    statistics_launch,
    statistics_work,
)
from .sass.counts import blocks_per_multiprocessor, committed
from .shapes import Point
from .token_launches import (
    SELECTION,
    relevance_plan,
    relevance_work,
    selection_cycles,
    selection_launch,
)

MULTIPROCESSORS, SHARED_MEMORY, ARCHITECTURE = 132, 227 * 1024, 90
RESERVED = 1024  # bytes of shared memory of a block that are the driver's
CLOCK = 1.755e9
LAUNCH = 2.5e-6
CYCLES_PER_PRODUCT = 1 / 0.62
ISSUED_PER_CYCLE, EXPONENTIALS_PER_CYCLE = 4, 16 / 32  # of warps

# Of a search: cycles for an instruction, likely, fastest and slowest; for a sum; before and after.
SEARCH_ISSUE, SEARCH_SUM, SEARCH_REST = (2.0, 1.5, 3.0), 30, 1000


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


@dataclass(frozen=True)
class Stage:
    """A kernel, and what it waits for.

    Attributes:
        launch: Its grid.
        work: What a block does.
        registers: Of a thread.
        moved: Seconds that HBM takes meanwhile.
        before: Seconds that HBM takes before it begins to work.
        launches: With those of smaller kernels that come along.
    """

    launch: Launch
    work: Work
    registers: int
    moved: float
    before: float = 0.0
    launches: int = 1

    def seconds(self, share: Share) -> float:
        of_grid = grid_seconds(self.launch, self.work, self.registers, share)
        return max(of_grid, self.moved) + self.before + self.launches * LAUNCH

    @property
    def by(self) -> str:
        of_grid = grid_seconds(self.launch, self.work, self.registers, LIKELY)
        if self.launches * LAUNCH > max(of_grid, self.moved) + self.before:
            return "launch"
        pipes = pipe_cycles(self.work)
        return "HBM" if self.moved > of_grid else max(pipes, key=lambda name: pipes[name])


def _expected(*stages: Stage) -> Expected:
    """Of kernels that run one after the other."""
    likely, fastest, slowest = (
        1e6 * sum(stage.seconds(share) for stage in stages) for share in (LIKELY, HIGH, LOW)
    )
    longest = max(stages, key=lambda stage: stage.seconds(LIKELY))
    at_once = blocks_at_once(longest.launch, longest.registers)
    return Expected((likely, fastest, slowest), longest.by, longest.launch, at_once)


def require_counted(point: Point, direction: str = "forward") -> None:
    is_counted = point.head_dim == HEAD_DIM
    if direction == "backward":
        is_counted = HEAD_DIM <= point.head_dim <= max(WIDTHS)
    if not is_counted or point.dtype != "bfloat16":
        raise ValueError(
            f"counts are of bfloat16 and heads of width {HEAD_DIM}, and to {max(WIDTHS)} backward, "
            f"not of {point}"
        )


def expect(point: Point, direction: str, memory: Memory) -> Expected:
    """The time of our attention, forward or backward without the weights' gradient.

    Args:
        point: bfloat16, heads of width 64, and to 80 backward.
        direction: "forward" or "backward".
        memory: Of the GPU.
    """
    require_counted(point, direction)
    kernels, _ = committed()
    heads = point.images * point.heads
    moved = attention_cost(point, direction).bytes / memory.bytes_per_second
    if direction == "forward":
        kernel = kernels[FORWARD]
        launch = forward_launch(point.length, heads, MULTIPROCESSORS, SHARED_MEMORY)
        work = forward_work(kernel, point.length, heads, MULTIPROCESSORS, SHARED_MEMORY)
        return _expected(Stage(launch, work, kernel.registers, moved))
    plan = backward_plan(point.length, heads, MULTIPROCESSORS, SHARED_MEMORY, point.head_dim)
    return expect_backward(point, plan, memory)


def expect_backward(point: Point, plan: BackwardPlan, memory: Memory) -> Expected:
    """The time of the backward pass by some plan."""
    kernels, _ = committed()
    kernel, launch = kernels[plan.kernel], plan.launch
    work = backward_work(kernel, plan, point.length, point.head_dim)
    moved = attention_cost(point, "backward").bytes / memory.bytes_per_second
    if plan.sweeps:
        return _expected(Stage(launch, work, kernel.registers, moved))
    # A kernel before it multiplies outputs with their gradients; it only reads.
    one = point.rows * point.head_dim * point.itemsize / memory.bytes_per_second
    return _expected(Stage(launch, work, kernel.registers, moved - one, 2 * one, launches=2))


def expect_statistics(point: Point, memory: Memory) -> Expected:
    """The time of attention's statistics, two kernels; the point as for ``expect``."""
    require_counted(point)
    kernels, _ = committed()
    launch = statistics_launch(point.length, point.images * point.heads)
    # Either reads queries and keys.
    moved = statistics_cost(point).bytes / memory.bytes_per_second
    works = [(kernels[name], statistics_work(kernels[name], point.length)) for name in STATISTICS]
    return _expected(*(Stage(launch, work, kernel.registers, moved) for kernel, work in works))


def expect_relevance(point: Point, memory: Memory) -> Expected:
    """The time of the relevance kernel: bfloat16 or float32."""
    kernels, _ = committed()
    plan = relevance_plan(point, MULTIPROCESSORS, SHARED_MEMORY)
    kernel = kernels[plan.kernel]
    work = relevance_work(kernel, point, plan)
    moved = relevance_cost(point).bytes / memory.bytes_per_second
    # Products begin when all columns of the first tokens have come: of those in the first wave.
    waves = -(-plan.launch.blocks // MULTIPROCESSORS)
    return _expected(Stage(plan.launch, work, kernel.registers, moved, moved / waves))


def expect_selection(point: Point) -> Expected:
    """The time of the selecting kernel, of up to 256 patches and as many images as fit at once."""
    kernels, _ = committed()
    kernel, launch = kernels[SELECTION], selection_launch(point)
    likely, fastest, slowest = (
        1e6 * (LAUNCH + (selection_cycles(kernel, issue, SEARCH_SUM) + SEARCH_REST) / CLOCK)
        for issue in SEARCH_ISSUE
    )
    by = "launch" if likely < 2e6 * LAUNCH else "search"
    return Expected(
        (likely, fastest, slowest), by, launch, blocks_at_once(launch, kernel.registers)
    )


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
