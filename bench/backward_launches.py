"""How the CUDA kernels of attention's backward pass are launched and what a block does: bfloat16.

The plans are those of csrc/cuda/backward_plan.h, for a GPU that is not there; a test runs the C++
launchers and compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launches import (
    CACHE_BYTES_PER_CYCLE,
    FRAGMENT,
    ITEM,
    TILE,
    VECTOR,
    Launch,
    Work,
    copy_costs,
    makespan,
    once,
    padded,
    parts_of,
    passes_of,
)
from .sass.counts import WARP, KernelCounts

# Widths that the kernels are counted for: a head takes the next one.
WIDTHS = (64, 80)

_CHUNK = 32  # rows that are loaded at a time
_MAX_WARPS = 4  # of a block of parts
_HEAD_ROWS, _MAX_HEAD_ROWS = 2 * TILE, 384  # that a warp and a block have of a whole head
_HEAD_STEP = TILE  # queries of a step
_ONE_SWEEP = 8  # warps at most
_GRAD_PITCH = 2 * _CHUNK * ITEM + VECTOR  # bytes between rows of the scores' gradients
# What plans are compared by, for each width, parts and then whole heads by sweeps: cycles of shared
# memory for 16 x 16 rows, and what a launch takes. See csrc/cuda/backward_plan.h.
_PAIR_COSTS = {64: (62, 78, 87), 80: (92, 108, 127)}
_LAUNCH_COST = 200_000
_DELTA_COST = 14  # instructions a query and 64 columns, to multiply outputs with their gradients
_LATENCY = 800  # cycles until the first rows come from HBM


@dataclass(frozen=True)
class BackwardPlan:
    """How the backward pass runs.

    Attributes:
        launch: Of the kernel that takes longest.
        sweeps: Times that the queries pass a block, which serves a whole head; 0 if blocks serve
            parts of keys and of queries.
        width: That the kernel is compiled for.
    """

    launch: Launch
    sweeps: int
    width: int

    @property
    def kernel(self) -> str:
        """The name under which it is counted."""
        if self.sweeps:
            return f"head_backward_kernel<bfloat16, {self.width}, 0, {self.sweeps}>"
        return f"attention_backward_kernel<bfloat16, {self.width}, 0>"

    @property
    def row_copies(self) -> float:
        """Copies of 16 bytes a lane that a warp issues for a row."""
        return self.width * ITEM / VECTOR / WARP

    @property
    def held_rows(self) -> int:
        """Rows that a warp holds, in parts: wider heads leave no registers for more."""
        return 2 * TILE if self.width <= 64 else TILE


def backward_plan(
    length: int, heads: int, multiprocessors: int, shared_memory: int, head_dim: int = 64
) -> BackwardPlan:
    """The launch of the backward kernel: of whole heads, or of keys and queries side by side."""
    width = next(each for each in WIDTHS if head_dim <= each)
    parts = parts_plan(length, heads, shared_memory, width)
    whole = head_plan(length, heads, width)
    if length > _MAX_HEAD_ROWS or whole.launch.shared > shared_memory:
        return parts
    if parts.launch.blocks <= 2 * multiprocessors:
        return parts

    def time(plan: BackwardPlan) -> int:
        tiles = plan.launch.warps * (2 if plan.sweeps else plan.held_rows // TILE)
        work = parts_of(length, TILE) * tiles * _PAIR_COSTS[width][plan.sweeps]
        return makespan(plan.launch, work, multiprocessors, shared_memory)

    return whole if time(whole) <= time(parts) + _LAUNCH_COST else parts


def parts_plan(length: int, heads: int, shared_memory: int, width: int) -> BackwardPlan:
    """Blocks of keys and of queries."""
    held = BackwardPlan(Launch(0, 0, 0), 0, width).held_rows
    tiles = parts_of(length, held)

    def room(warps: int) -> int:
        rows = 2 * warps * held + 4 * _CHUNK
        return parts_of(length, _CHUNK) * _CHUNK * 8 + rows * (width * ITEM + VECTOR)

    warps = min(tiles, _MAX_WARPS)
    while warps > 1 and room(warps) > shared_memory:
        warps -= 1
    launch = Launch(heads * 2 * parts_of(tiles, warps), warps, room(warps))
    return BackwardPlan(launch, 0, width)


def head_plan(length: int, heads: int, width: int) -> BackwardPlan:
    """Blocks of whole heads, if they fit."""
    warps, pitch = parts_of(length, _HEAD_ROWS), width * ITEM + VECTOR
    shared = _MAX_HEAD_ROWS * 8 + 4 * _CHUNK * pitch
    shared += warps * _HEAD_ROWS * (2 * pitch + _GRAD_PITCH)
    return BackwardPlan(Launch(heads, warps, shared), 1 if warps <= _ONE_SWEEP else 2, width)


def backward_work(
    kernel: KernelCounts, plan: BackwardPlan, length: int, head_dim: int = 64
) -> Work:
    """What a block of the backward kernel does; ``kernel`` is the plan's."""
    if plan.sweeps:
        return _whole_head_work(kernel, plan, length, head_dim * ITEM)
    return _two_parts_work(kernel, plan, length, head_dim * ITEM)


def _whole_head_work(kernel: KernelCounts, plan: BackwardPlan, length: int, row_bytes: int) -> Work:
    of_queries, *sweeps = kernel.main_loops
    warps, rounds = plan.launch.warps, parts_of(length, _CHUNK)
    steps, rows = parts_of(length, _HEAD_STEP), _CHUNK * rounds
    copies = (2 * warps * _HEAD_ROWS + 2 * plan.sweeps * rows) * plan.row_copies
    of_head = Work(
        instructions=copies * max(kernel.copies) + rows * parts_of(plan.width, 64) * _DELTA_COST,
        products=0,
        exponentials=0,
        shared=FRAGMENT * copies,
        # Queries with their gradients come again for each sweep; outputs, keys and values once,
        # as three gradients go.
        cache_bytes=(2 * plan.sweeps + 6) * length * row_bytes,
        waiting=_LATENCY + 4 * length * row_bytes / CACHE_BYTES_PER_CYCLE,
    )
    # A round's gradients of queries: 32 keys a pass, in parts of 16 columns.
    parts = plan.width // TILE
    of_head += (passes_of(of_queries, warps) + once(of_queries.around[0])) * (parts * rounds)
    stores = 2 * plan.row_copies * _HEAD_ROWS  # of the gradients of keys and values
    of_warp = once(sweeps[0].around[-1] + stores * max(kernel.stores))
    of_warp += Work(0, 0, 0, shared=FRAGMENT * 2 * stores, cache_bytes=0)
    for sweep in sweeps:
        of_warp += passes_of(sweep, steps) + once(rounds * sweep.around[0])
    return of_head + of_warp * warps


def _two_parts_work(kernel: KernelCounts, plan: BackwardPlan, length: int, row_bytes: int) -> Work:
    """The mean of blocks with keys and with queries."""
    warps, held = plan.launch.warps, plan.row_copies * plan.held_rows
    parts = parts_of(parts_of(length, plan.held_rows), warps)
    # A step is of as many pairs for any width: 32 rows with 16, or 16 with 32, of which the last
    # may be 16.
    step_rows = 2 * TILE * TILE // plan.held_rows
    steps, chunks = padded(length) / step_rows, parts_of(length, _CHUNK)
    copy, copy_streamed = copy_costs(kernel)
    most = max(loop.products for loop in kernel.main_loops)
    total = once(0)
    for loop in kernel.main_loops:
        gradients = 2 if loop.products == most else 1  # of keys and of values, or of queries
        of_warp = passes_of(loop, steps) + Work(
            instructions=chunks * loop.around[0]
            + loop.around[-1]
            + held * (2 * copy + gradients * max(kernel.stores)),
            products=0,
            exponentials=0,
            shared=FRAGMENT * (2 + 2 * gradients) * held,
            cache_bytes=0,
        )
        copies = 2 * padded(length) * plan.row_copies
        of_block = Work(
            instructions=copies * copy_streamed,
            products=0,
            exponentials=0,
            shared=FRAGMENT * copies,
            cache_bytes=((2 + gradients) * length / parts + 2 * length) * row_bytes,
        )
        total += (of_warp * warps + of_block) * 0.5
    return total
