"""How the CUDA attention kernels are launched and what a block does: bfloat16, heads of width 64.

The plans are those of csrc/cuda/forward_plan.h and attention_statistics.cu, for a GPU that is not
there; a test runs the C++ launchers and compares. The backward pass has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from .sass.counts import WARP, KernelCounts, MainLoop

FORWARD = "attention_forward_kernel<bfloat16, 64>"
STATISTICS = ("row_statistics_kernel<bfloat16, 64>", "column_statistics_kernel<bfloat16, 64>")

HEAD_DIM, ITEM = 64, 2
TILE = 16  # rows of a product
_HELD = 2 * TILE  # rows that a warp holds
VECTOR = 16  # bytes of a copy
_PITCH = HEAD_DIM * ITEM + VECTOR  # bytes from row to row in shared memory
_ROW_COPIES = HEAD_DIM * ITEM / VECTOR / WARP  # that a warp issues for a row
_FORWARD_CHUNK, _STATISTICS_CHUNK = 64, 32
_MAX_WARPS = 4  # of a block
# The costs by which the forward kernel's plans are compared, in units of 43 instructions: see
# csrc/cuda/forward_plan.h.
_PASS_COST, _STEP_COST, _TILE_COST, _WARP_COST, _COPY_COST, _MOVE_COST = 16, 5, 17, 6, 3, 16
_WARPS_AT_ONCE, _RESERVED, _OF_ONE = 8, 1024, 5040
CACHE_BYTES_PER_CYCLE = 24  # of the L2 cache, by a multiprocessor
FRAGMENT = 4  # cycles of shared memory for LDSM.x4, a copy or a store of a warp: 512 bytes


@dataclass(frozen=True)
class Launch:
    """A grid of one kernel.

    Attributes:
        blocks: Of the grid.
        warps: Of a block.
        shared: Bytes of shared memory that a block asks for.
    """

    blocks: int
    warps: int
    shared: int


@dataclass(frozen=True)
class Work:
    """What a block does, or several do on average.

    Attributes:
        instructions: That its warps issue.
        products: HMMA.16816 that are carried out.
        exponentials: MUFU.EX2 that its warps issue.
        shared: Cycles for which shared memory is busy.
        cache_bytes: To and from the L2 cache.
        waiting: Cycles for its first rows, in which only other blocks have something to do.
    """

    instructions: float
    products: float
    exponentials: float
    shared: float
    cache_bytes: float
    waiting: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.instructions + other.instructions,
            self.products + other.products,
            self.exponentials + other.exponentials,
            self.shared + other.shared,
            self.cache_bytes + other.cache_bytes,
            self.waiting + other.waiting,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            factor * self.instructions,
            factor * self.products,
            factor * self.exponentials,
            factor * self.shared,
            factor * self.cache_bytes,
            factor * self.waiting,
        )


@dataclass(frozen=True)
class _ForwardPlan:
    launch: Launch
    parts: int  # blocks of a head
    is_resident: bool  # all keys and values stay in shared memory
    rounds: int  # tiles that a warp takes one after the other


def _forward_plan(
    length: int, heads: int, multiprocessors: int, shared_memory: int
) -> _ForwardPlan:
    tiles, chunks = parts_of(length, _HELD), parts_of(length, _FORWARD_CHUNK)

    def room(warps: int, rows: int) -> int:
        return chunks * _FORWARD_CHUNK * 4 + (warps * _HELD + 2 * rows) * _PITCH

    def plan_with(warps: int, parts: int) -> _ForwardPlan:
        rounds, rows = parts_of(tiles, parts * warps), padded(length)
        is_resident = chunks <= 2 or (rounds > 1 and room(warps, rows) <= shared_memory // 2)
        if not is_resident:
            rows = 2 * _FORWARD_CHUNK
        launch = Launch(heads * parts, warps, room(warps, rows))
        return _ForwardPlan(launch, parts, is_resident, rounds)

    def time(plan: _ForwardPlan) -> int:
        launch, sixteens = plan.launch, parts_of(length, TILE)
        whole, steps = divmod(sixteens, _FORWARD_CHUNK // TILE)
        loaded = sixteens * (1 if plan.is_resident else plan.rounds)
        of_tile = whole * _PASS_COST + steps * _STEP_COST + _TILE_COST
        issued = launch.warps * (plan.rounds * of_tile + _WARP_COST) + loaded * _COPY_COST
        work = max(issued, (loaded + sixteens // plan.parts) * _MOVE_COST)
        return makespan(launch, work, multiprocessors, shared_memory)

    ring = min(padded(length), 2 * _FORWARD_CHUNK)
    most = min(tiles, _MAX_WARPS)
    while most > 1 and room(most, ring) > shared_memory:
        most -= 1
    candidates = {
        (warps, parts_of(tiles, warps * rounds))
        for warps in range(1, most + 1)
        for rounds in range(1, parts_of(tiles, warps) + 1)
    }
    plans = [plan_with(*each) for each in candidates]
    return min(plans, key=lambda plan: (time(plan), plan.parts, -plan.launch.warps))


def makespan(launch: Launch, work: int, multiprocessors: int, shared_memory: int) -> int:
    """How long a grid takes whose blocks do so much work, as csrc/cuda/makespan.h has it."""
    fitting = (shared_memory + _RESERVED) // (launch.shared + _RESERVED)
    at_once = max(1, min(fitting, _WARPS_AT_ONCE // launch.warps))
    full, rest = divmod(parts_of(launch.blocks, multiprocessors), at_once)
    total = full * at_once * (_OF_ONE // _rate(at_once * launch.warps))
    return work * (total + (rest and rest * (_OF_ONE // _rate(rest * launch.warps))))


def _rate(warps: int) -> int:
    """How fast a multiprocessor works with so many warps: as ``model.LIKELY``, 20 with eight."""
    return 3 * warps if warps <= 4 else 4 + 2 * min(warps, 8)


def forward_launch(length: int, heads: int, multiprocessors: int, shared_memory: int) -> Launch:
    """The launch of the forward kernel.

    Args:
        length: L, tokens.
        heads: B·H.
        multiprocessors: Of the GPU.
        shared_memory: Bytes that one block may use.
    """
    return _forward_plan(length, heads, multiprocessors, shared_memory).launch


def forward_work(
    kernel: KernelCounts, length: int, heads: int, multiprocessors: int, shared_memory: int
) -> Work:
    """What a block of the forward kernel does."""
    plan = _forward_plan(length, heads, multiprocessors, shared_memory)
    chunk, step = kernel.main_loops
    copy, copy_streamed = copy_costs(kernel)
    # The last keys come by sixteens, where they do not fill a chunk.
    chunks, rest = divmod(padded(length), _FORWARD_CHUNK)
    held = _ROW_COPIES * _HELD
    of_tile = Work(
        instructions=chunk.around[0] + held * (copy + max(kernel.stores)),
        products=0,
        exponentials=0,
        # Queries are copied, read and, as outputs, written and read again.
        shared=FRAGMENT * 4 * held,
        cache_bytes=0,
    )
    of_tile += passes_of(chunk, chunks) + passes_of(step, rest // TILE)
    of_tile += once(step.around[0] if rest else 0)
    loads = 1 if plan.is_resident else plan.rounds
    rows = loads * padded(length)
    of_block = Work(
        instructions=2 * rows * _ROW_COPIES * copy_streamed,
        products=0,
        exponentials=0,
        shared=FRAGMENT * 2 * rows * _ROW_COPIES,
        # Queries in and outputs out are shared by a head's blocks, keys and values are not.
        cache_bytes=(2 * length / plan.parts + 2 * loads * length) * HEAD_DIM * ITEM,
    )
    warps = plan.launch.warps
    return of_tile * (plan.rounds * warps) + of_block + once(warps * chunk.around[-1])


def statistics_launch(length: int, heads: int) -> Launch:
    """The launch of either statistics kernel."""
    tiles = parts_of(length, _HELD)
    warps = min(tiles, _MAX_WARPS)
    rows = warps * _HELD + 2 * _STATISTICS_CHUNK
    chunks = parts_of(length, _STATISTICS_CHUNK)
    return Launch(
        heads * parts_of(tiles, warps), warps, chunks * _STATISTICS_CHUNK * 8 + rows * _PITCH
    )


def statistics_work(kernel: KernelCounts, length: int) -> Work:
    """What a block of a statistics kernel does."""
    (loop,) = kernel.main_loops
    warps = statistics_launch(length, 1).warps
    parts = parts_of(parts_of(length, _HELD), warps)
    copy, copies = min(kernel.copies), padded(length) * _ROW_COPIES
    held = _ROW_COPIES * _HELD
    of_warp = passes_of(loop, parts_of(length, _STATISTICS_CHUNK)) + Work(
        instructions=sum(loop.around) + held * copy,
        products=0,
        exponentials=0,
        shared=FRAGMENT * 2 * held,
        cache_bytes=0,
    )
    of_block = Work(
        instructions=copies * copy,
        products=0,
        exponentials=0,
        shared=FRAGMENT * copies,
        cache_bytes=(length / parts + length) * HEAD_DIM * ITEM,
    )
    return of_warp * warps + of_block


def copy_costs(kernel: KernelCounts) -> tuple[float, float]:
    """Instructions per copy of rows that a warp holds, and of rows that are streamed.

    The latter are found anew in each pass, and may depend on weights: they cost more.
    """
    least = min(kernel.copies)
    return least, fmean([each for each in kernel.copies if each > 1.2 * least] or [least])


def passes_of(loop: MainLoop, number: float) -> Work:
    """What a warp does in passes of a main loop, copies aside."""
    of_one = Work(
        instructions=loop.instructions,
        products=loop.products,
        exponentials=loop.kinds.get("MUFU.EX2", 0),
        shared=FRAGMENT * loop.kinds["LDSM"] + loop.kinds.get("LDS", 0) + loop.kinds.get("STS", 0),
        cache_bytes=0,
    )
    return of_one * number


def once(instructions: float) -> Work:
    """What is nothing but instructions."""
    return Work(instructions, 0, 0, 0, 0)


def parts_of(whole: int, part: int) -> int:
    """How many parts the whole is cut into, of which the last may be smaller."""
    return -(-whole // part)


def padded(length: int) -> int:
    """Rows are loaded and multiplied by sixteens."""
    return parts_of(length, TILE) * TILE
