"""What a forward kernel with Hopper's own instructions should gain: one that is not written.

wgmma multiplies from shared memory, without the fragments that ``mma.sync`` has to read first,
and at the tensor cores' whole rate. TMA copies tiles without an instruction for each 16 bytes.
Code with them is compiled for sm_90a and runs on capability 9.0 alone, so no other machine tells
whether it is right: it is to be written where it can be run. This is what to expect of it.

The kernel that is modelled:

- A tile is 64 queries of a head, which a warpgroup multiplies with all keys at once up to 256 of
  them, rounded up to 8, so that a row's softmax needs no running maximum; beyond that with blocks
  of 192 keys, and a last one of what is left.
- Two warpgroups take turns: one's exponentials run while the other multiplies. A multiprocessor
  does 4096 operations of products and 16 exponentials a cycle, and a pair of a query and a key
  takes 256 of the former and one of the latter: as long, with heads of width 64.
- Blocks stay, as many as there are multiprocessors, and take tiles in turn: no last wave.
- The pipes are busy half of the time, from 40 to 62 %. FlashAttention-3, of this design, reaches
  497 of 989 TFLOP/s for such heads and 16 k tokens, and 392 at 1 k (arXiv 2407.08608).

The rates of the machine and of memory are those of ``bench/model.py``.
"""

from __future__ import annotations

from .counting import attention_cost
from .launches import HEAD_DIM, Launch
from .model import (
    CLOCK,
    EXPONENTIALS_PER_CYCLE,
    LAUNCH,
    MULTIPROCESSORS,
    Expected,
    Memory,
    require_counted,
)
from .sass.counts import WARP
from .shapes import Point

PRODUCTS_PER_CYCLE = 4096  # operations of a multiprocessor, by wgmma
BUSY = (0.50, 0.62, 0.40)  # shares of the time: likely, highest, lowest
TILE_ROWS, KEY_STEP, WHOLE_ROW, KEY_BLOCK = 64, 8, 256, 192
WARPGROUP, PRODUCERS = 4, 1  # warps; those that copy
_ITEM = 2


def _rounded(length: int) -> int:
    """Keys that products take for so many."""
    return -(-length // KEY_STEP) * KEY_STEP


def tile_cycles(length: int) -> float:
    """Cycles of a multiprocessor for 64 queries and all keys, if its pipes were never idle."""
    pairs = TILE_ROWS * _rounded(length)
    products = 2 * 2 * pairs * HEAD_DIM / PRODUCTS_PER_CYCLE
    return max(products, pairs / (EXPONENTIALS_PER_CYCLE * WARP))


def expect_with_wgmma(point: Point, memory: Memory) -> Expected:
    """The time that the forward pass should take; bfloat16 and heads of width 64."""
    require_counted(point)
    tiles = point.images * point.heads * -(-point.length // TILE_ROWS)
    moved = attention_cost(point, "forward").bytes / memory.bytes_per_second
    most = -(-tiles // MULTIPROCESSORS)
    seconds = [max(most * tile_cycles(point.length) / (share * CLOCK), moved) for share in BUSY]
    likely, fastest, slowest = (1e6 * (each + LAUNCH) for each in seconds)
    # Two tiles of queries, and keys and values: all, or two blocks in turn.
    keys = _rounded(point.length) if point.length <= WHOLE_ROW else 2 * KEY_BLOCK
    shared = 2 * (TILE_ROWS + keys) * HEAD_DIM * _ITEM
    launch = Launch(min(tiles, MULTIPROCESSORS), 2 * WARPGROUP + PRODUCERS, shared)
    by = "HBM" if seconds[0] == moved else "tensor"
    return Expected((likely, fastest, slowest), by, launch, 1)
