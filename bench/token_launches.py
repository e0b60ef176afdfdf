"""How the kernels of relevance and of selection are launched and what a block does.

The plans are those of csrc/cuda/relevance_plan.h and selection.cu, for a GPU that is not there; a
test runs the C++ launchers and compares. Tokens, norm and projection are of one type, aligned and
contiguous, as a model's are.
"""

from __future__ import annotations

from dataclasses import dataclass

from .launches import FRAGMENT, Launch, Work, once, parts_of, passes_of
from .sass.counts import WARP, KernelCounts
from .shapes import Point

SELECTION = "select_kernel"

_WARPS, _SLICE, _MAX_STAGES, _MAX_CLASSES, _CLASSES = 8, 256, 5, 256, 8
_STEP_BYTES, _VECTOR = 64, 16  # of a row's part that is multiplied in a step; of a copy
_NAMES = {"bfloat16": "bfloat16", "float32": "float"}
# Instructions for 32 elements of the tokens that go through LayerNorm: read twice for the
# statistics, once to be normalised. Counted by hand in the source.
_NORM_COST = 10
# Of a warp's search, whose lanes hold up to 8 keys: how many bits it goes through before a class's
# selection is exact, of the 32 that keys have.
_SEARCHED_BITS, _HELD_KEYS = 24, 8


@dataclass(frozen=True)
class RelevancePlan:
    """A launch of the relevance kernel.

    Attributes:
        kernel: Its name among the counts.
        launch: The grid.
        tokens: Of a block.
        is_whole: All columns of a block's tokens are in shared memory at once.
        cost: What plans are compared by.
    """

    kernel: str
    launch: Launch
    tokens: int
    is_whole: bool
    cost: int


def relevance_plan(point: Point, multiprocessors: int, shared_memory: int) -> RelevancePlan:
    """The launch of the relevance kernel, one class group.

    Args:
        point: Its images, patches, widths, classes and type.
        multiprocessors: Of the GPU.
        shared_memory: Bytes that one block may use.
    """
    small, medium, large = (
        _relevance_candidate(point, rows, multiprocessors, shared_memory) for rows in (1, 2, 3)
    )
    if large.cost < min(small.cost, medium.cost):
        return large
    return medium if medium.cost < small.cost else small


def _relevance_candidate(
    point: Point, rows: int, multiprocessors: int, shared_memory: int
) -> RelevancePlan:
    item = point.itemsize
    token_warps = 2 if item == 2 else 1
    tokens = 16 * rows * token_warps
    tiles = parts_of(point.images * point.patches, tokens)
    blocks = tiles * parts_of(point.num_classes, _MAX_CLASSES)
    depth, vector = _STEP_BYTES // item, _VECTOR // item
    whole = parts_of(point.model_dim, depth) * depth
    token_bytes, state = tokens * item, 24 * tokens + 4 * _MAX_CLASSES
    slot = depth * (_SLICE + 8) * item
    stages = (shared_memory - state - (whole + vector) * token_bytes) // slot
    stages = min(stages if stages >= 2 else 3, _MAX_STAGES)
    class_room = 4 * (_CLASSES * _SLICE + (_CLASSES + 1) * _WARPS // token_warps * tokens)
    rest = max(stages * slot, class_room)
    room = (shared_memory - state - rest) // token_bytes - vector
    span = min(whole, room // depth * depth)
    launch = Launch(blocks, _WARPS, state + (span + vector) * token_bytes + rest)
    cost = parts_of(blocks, multiprocessors) * (tokens + 32) * (4 if span < whole else 3)
    name = f"relevance_kernel<{_NAMES[point.dtype]}, {rows}, 1>"
    return RelevancePlan(name, launch, tokens, span == whole, cost)


def relevance_work(kernel: KernelCounts, point: Point, plan: RelevancePlan) -> Work:
    """What a block of the relevance kernel does."""
    (loop,) = kernel.main_loops
    slices = parts_of(point.joint_dim, _SLICE)
    steps = parts_of(point.model_dim * point.itemsize, _STEP_BYTES)
    of_tokens = plan.tokens * point.model_dim
    normed = 1 if plan.is_whole else slices
    # A class's product with a lane's features, summed over the lanes that share a token.
    features = plan.tokens * _SLICE // (_WARPS * WARP)
    of_class = 2 * features + 3 * plan.tokens // 8 + 30
    of_warp = passes_of(loop, slices * steps) + once(
        slices * (loop.around[0] + point.num_classes * of_class) + loop.around[-1]
    )
    of_block = Work(
        instructions=_NORM_COST * normed * of_tokens / WARP,
        products=0,
        exponentials=0,
        # Tokens are copied, read for the statistics, and read and written to be normalised.
        shared=FRAGMENT * 5 * normed * of_tokens * point.itemsize / (_VECTOR * WARP)
        + FRAGMENT * loop.kinds["LDGSTS"] * _WARPS * slices * steps,
        cache_bytes=normed * of_tokens * point.itemsize + slices * steps * _STEP_BYTES * _SLICE,
    )
    return of_warp * _WARPS + of_block


def selection_launch(point: Point) -> Launch:
    """The launch of the selecting kernel: a block an image, a warp a class; up to 32 classes."""
    warps = min(point.num_classes, 32)
    return Launch(point.images, warps, (warps + 1) * point.patches * 4)


def selection_cycles(kernel: KernelCounts, per_instruction: float, per_exchange: float) -> float:
    """How long a warp takes to search, alone on its scheduler; up to 256 patches.

    Args:
        kernel: The selecting kernel.
        per_instruction: Cycles from an instruction to the next, which needs its result or not.
        per_exchange: Cycles that a sum over a warp takes.
    """
    search = min(loop.instructions for loop in kernel.main_loops)
    # Once the cut is found, every lane goes through its keys again: about as long as a bit.
    passes = _SEARCHED_BITS + _HELD_KEYS
    return passes * (search * per_instruction + per_exchange)
