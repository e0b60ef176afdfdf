"""What the kernels' loops may cost at most: bfloat16, heads of width 64 and 80, sm_90.

A budget is today's number, rounded up by the little that another arrangement of the same work may
take. Whoever needs more says here what it is for; whoever needs less lowers the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .counts import KernelCounts, MainLoop

# Kinds that the compiler exchanges for one another count together.
GROUPS = {
    "arithmetic": ("FADD", "FMUL", "FFMA"),
    "comparison": ("FMNMX", "FSEL", "FSETP"),
    "branch": ("BSSY", "BRA"),
    "access": ("LDS", "STS", "LDG", "STG"),
}


@dataclass(frozen=True)
class LoopBudget:
    """Limits on a pass of a main loop.

    Attributes:
        products: Tensor-core products, exactly: with another number a pass is another piece of
            work, and its budget has to be found anew.
        instructions: All that a warp issues.
        kinds: Limits on kinds of instructions or on ``GROUPS`` of them.
    """

    products: int
    instructions: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class KernelBudget:
    """Limits on an instance of a kernel; none may spill.

    Attributes:
        registers: Of a thread.
        loops: Of the main loops, in the order of the code.
        copy: Instructions per asynchronous copy of 16 bytes, of the dearest loop.
        store: The same of 16-byte stores.
    """

    registers: int
    loops: list[LoopBudget] = field(default_factory=list)
    copy: float | None = None
    store: float | None = None


# Registers: with 255 a warp, as with these, 8 warps fit on a multiprocessor; launch bounds ask for
# two blocks of 4 warps. A few more are no harm up to there.
_TWO_BLOCKS = 255
# Three blocks of 4 warps, or one of 12: 65536 registers / 12 warps / 32 threads, in steps of 8.
_THREE_BLOCKS = 168

# Of whole heads, the gradients of 32 queries: 32 keys with 16 columns, 2 x 2 x 2 products.
_HEAD_QUERIES = LoopBudget(8, 22, {"LDSM": 6, "branch": 1})  # 21

# And of width 80, what all their other loops share.
_WIDE = {"MUFU.EX2": 16, "arithmetic": 82, "access": 12, "branch": 1}

BUDGETS = {
    "attention_forward_kernel<bfloat16, 64>": KernelBudget(
        registers=_TWO_BLOCKS,
        loops=[
            # 32 queries with 64 keys: 2 x 8 x 4 products each for scores and for outputs.
            LoopBudget(
                128,
                700,  # 689: the kernel is bound by them
                {
                    "LDSM": 32,  # 16 of keys, 16 of values; those of queries are held
                    "MUFU.EX2": 68,  # 64 scores a lane, and 4 corrections
                    # Of 64 scores: scale and bias in one, shift, sum. And 4 totals, rescaled.
                    "arithmetic": 200,
                    # 64 maxima, 64 scores replaced where a key is not attended to, 16 tests for
                    # that, and 20 about the maxima of rows.
                    "comparison": 168,
                    "access": 8,  # biases
                    "branch": 12,
                },
            ),
            # The same with 16 keys, for those that do not fill a chunk.
            LoopBudget(
                32,
                220,  # 211
                {
                    "LDSM": 8,
                    "MUFU.EX2": 20,
                    "arithmetic": 56,
                    "comparison": 56,
                    "access": 2,
                    "branch": 6,
                },
            ),
        ],
        copy=14,  # 13
        store=40,
    ),
    # Without causality. With it, each step also compares its rows with its columns.
    "attention_backward_kernel<bfloat16, 64, 0>": KernelBudget(
        registers=_TWO_BLOCKS,
        loops=[
            # Stationary queries, 32 with 16 keys: scores, gradients of probabilities and of
            # queries, 2 x 2 x 4 products each.
            LoopBudget(
                48,
                205,  # 199
                {
                    # 16 of the stationary rows, which do not fit into registers; 12 of the others.
                    "LDSM": 28,
                    "MUFU.EX2": 16,
                    # Exponents 16 + 16, gradients 16 + 16.
                    "arithmetic": 66,
                    "comparison": 20,  # 16 gradients of keys that are not attended to, 4 tests
                    "access": 2,
                    "branch": 1,
                },
            ),
            # Stationary keys, 32 with 16 queries: the gradient of values comes on top.
            LoopBudget(
                64,
                296,  # 286
                {
                    "LDSM": 32,
                    "MUFU.EX2": 16,
                    "arithmetic": 82,  # as above, and 16 sums for the gradient of weights
                    "comparison": 52,  # as above, 16 probabilities and 16 limits of exponents
                    "access": 4,
                    "branch": 1,
                },
            ),
        ],
        copy=20,  # 18: streamed rows, whose weights decide; 13 for others
        store=35,
    ),
    # Whole heads, without causality, in one sweep of the queries: 8 warps of 255 registers, or four
    # blocks of two for heads of few keys.
    "head_backward_kernel<bfloat16, 64, 0, 1>": KernelBudget(
        registers=255,
        loops=[
            _HEAD_QUERIES,
            # 32 keys with 16 queries: four products, 2 x 2 x 4 each.
            LoopBudget(
                64,
                310,  # 301
                {
                    # 8 of values, which do not fit into registers beside the keys; 16 of others.
                    "LDSM": 24,
                    "MUFU.EX2": 16,
                    "arithmetic": 82,  # as with stationary keys above, and so the comparisons
                    "comparison": 52,
                    "access": 12,  # and 8 pairs of the scores' gradients
                    "branch": 1,
                },
            ),
        ],
        copy=15,  # 14
        store=35,
    ),
    # The same in two sweeps, 12 warps of 168 registers: for the gradients of queries and keys, and
    # for those of values.
    "head_backward_kernel<bfloat16, 64, 0, 2>": KernelBudget(
        registers=_THREE_BLOCKS,
        loops=[
            _HEAD_QUERIES,
            LoopBudget(
                48,
                275,  # 266
                {
                    "LDSM": 20,
                    "MUFU.EX2": 16,
                    "arithmetic": 82,
                    "comparison": 36,
                    "access": 12,
                    "branch": 1,
                },
            ),
            LoopBudget(
                32,
                156,  # 150
                {
                    "LDSM": 8,
                    "MUFU.EX2": 16,
                    "arithmetic": 34,
                    "comparison": 36,
                    "access": 2,
                    "branch": 1,
                },
            ),
        ],
        copy=15,  # 13
        store=36,
    ),
    # The same, causal: a step also compares its keys with its queries.
    "head_backward_kernel<bfloat16, 64, 1, 2>": KernelBudget(
        registers=_THREE_BLOCKS,
        loops=[
            _HEAD_QUERIES,
            LoopBudget(48, 298, {"LDSM": 20, "MUFU.EX2": 16, "branch": 3}),  # 288
            LoopBudget(32, 167, {"LDSM": 8, "MUFU.EX2": 16, "branch": 3}),  # 160
        ],
        copy=15,
        store=36,
    ),
    # Heads of width 80, in parts: 16 queries with 32 keys, 4 x 5 products each, and 16 keys with 32
    # queries. No stationary row is held, so that both are bound by shared memory.
    "attention_backward_kernel<bfloat16, 80, 0>": KernelBudget(
        registers=_TWO_BLOCKS,
        loops=[
            LoopBudget(60, 298, {"LDSM": 40, "MUFU.EX2": 16, "branch": 6}),  # 288
            LoopBudget(80, 422, {"LDSM": 50, "MUFU.EX2": 16, "branch": 10}),  # 409
        ],
        copy=52,  # 50
        store=35,
    ),
    # Whole: 32 keys with 16 queries, 2 x 2 x 5 products for each of four or three and two. Of the
    # warp's keys 2 of 5 fragments are held in one sweep, 1 in the first of two and 4 in the second.
    "head_backward_kernel<bfloat16, 80, 0, 1>": KernelBudget(
        registers=255,
        loops=[
            _HEAD_QUERIES,
            # 6 LDSM of keys, 10 of values, 20 of queries and of the gradients of their outputs.
            LoopBudget(80, 340, _WIDE | {"LDSM": 36, "comparison": 52}),  # 330
        ],
        copy=37,  # 35: a row is no power of two of copies
        store=35,
    ),
    "head_backward_kernel<bfloat16, 80, 0, 2>": KernelBudget(
        registers=_THREE_BLOCKS,
        loops=[
            _HEAD_QUERIES,
            LoopBudget(60, 292, _WIDE | {"LDSM": 33, "comparison": 36}),  # 283
            LoopBudget(40, 172, _WIDE | {"LDSM": 12, "comparison": 36, "access": 2}),  # 166
        ],
        copy=37,  # 36
        store=36,
    ),
    "row_statistics_kernel<bfloat16, 64>": KernelBudget(
        registers=_THREE_BLOCKS,
        # 32 queries with 32 keys: scores.
        loops=[
            LoopBudget(
                32,
                485,  # 468: three sums per row, the entropy's without cancellation
                {
                    "LDSM": 8,  # of keys; those of queries are held
                    "MUFU.EX2": 36,
                    "arithmetic": 188,
                    "comparison": 154,
                    "access": 4,
                    "branch": 5,  # one for chunks in which some keys come after their query
                },
            )
        ],
        copy=14,  # 13
    ),
    "column_statistics_kernel<bfloat16, 64>": KernelBudget(
        registers=_THREE_BLOCKS,
        # 32 keys with 32 queries: scores.
        loops=[
            LoopBudget(
                32,
                385,  # 376: each probability is added to one of two sums
                {
                    "LDSM": 16,
                    "MUFU.EX2": 32,
                    "arithmetic": 164,
                    "comparison": 66,
                    "access": 4,
                    "branch": 5,
                },
            )
        ],
        copy=14,  # 13
    ),
    # A step of 32 rows of the projection, for 16, 32 or 48 tokens and 64 features of each warp. Of
    # a later step come the copies, 4 a thread.
    **{
        f"relevance_kernel<bfloat16, {rows}, 1>": KernelBudget(
            registers=255,  # one block of 8 warps
            loops=[
                LoopBudget(
                    16 * rows,
                    instructions,
                    {
                        "LDSM": 8 + 2 * rows,  # of the projection, and of the tokens
                        "LDGSTS": 4,
                        "branch": 15,  # 14
                        "access": 3,  # the compiler puts three that do nothing before copies
                    },
                )
            ],
        )
        for rows, instructions in ((1, 182), (2, 194), (3, 233))  # 175, 187, 224
    },
    # A step of 16 rows of the projection, for 16, 32 or 48 tokens and 32 features of each warp, in
    # three products for one.
    **{
        f"relevance_kernel<float, {rows}, 1>": KernelBudget(
            registers=255,
            loops=[
                LoopBudget(
                    24 * rows,
                    instructions,
                    {
                        "LDSM": 4 + 2 * rows,  # of the projection, and of the tokens
                        "LDGSTS": 4,
                        # To split a number of 16 + 8 for each row takes one, to add a sum of 32.
                        "arithmetic": 16 + 40 * rows,
                        "branch": 16,  # 15
                        "access": 3,
                    },
                )
            ],
        )
        for rows, instructions in ((1, 280), (2, 355), (3, 455))  # 269, 343, 441
    },
    # A bit of a class's threshold: a lane's 25 or 8 keys are compared, and counted over the warp.
    # The same again for rows too long for shared memory.
    "select_kernel": KernelBudget(
        registers=64,  # two blocks of 16 warps
        loops=[
            LoopBudget(0, instructions, {"REDUX": 1, "branch": 3})
            for instructions in (93, 37, 93, 37)  # 89, 35
        ],
    ),
}


def over_budget(found: dict[str, KernelCounts]) -> Iterator[str]:
    """Each limit that is passed, in words; a kernel that is not among those found too."""
    for name, budget in BUDGETS.items():
        if name not in found:
            yield f"{name}: there is no such kernel; there are {', '.join(found)}"
            continue
        for what in _over(found[name], budget):
            yield f"{name}: {what}"


def _over(kernel: KernelCounts, budget: KernelBudget) -> Iterator[str]:
    if kernel.registers > budget.registers:
        yield f"{kernel.registers} registers; the budget is {budget.registers}"
    if kernel.stack or kernel.spills:
        yield f"registers are spilled: {kernel.spills} accesses, {kernel.stack} bytes of stack"
    found = [loop.products for loop in kernel.main_loops]
    if found != (wanted := [loop.products for loop in budget.loops]):
        yield (
            f"main loops with {found} products a pass, not {wanted}: the work is cut otherwise, "
            "and needs budgets of its own"
        )
    else:
        for loop, limits in zip(kernel.main_loops, budget.loops, strict=True):
            for what in _loop_over(loop, limits):
                yield f"main loop with {loop.products} products: {what}"
    for name, costs, limit in (
        ("copy", kernel.copies, budget.copy),
        ("store", kernel.stores, budget.store),
    ):
        if limit is None:
            continue
        if not costs:
            yield f"no loop that does a 16-byte {name} was found"
        elif max(costs) > limit:
            yield f"{max(costs):g} instructions per 16-byte {name}; the budget is {limit:g}"


def _loop_over(loop: MainLoop, budget: LoopBudget) -> Iterator[str]:
    if loop.instructions > budget.instructions:
        yield f"{loop.instructions} instructions a pass; the budget is {budget.instructions}"
    for name, limit in budget.kinds.items():
        number = sum(loop.kinds.get(kind, 0) for kind in GROUPS.get(name, (name,)))
        if number > limit:
            yield f"{number} {name} a pass; the budget is {limit}"
