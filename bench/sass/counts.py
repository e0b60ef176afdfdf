"""Counts of a kernel's main loops, its copies and its resources, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .listing import Instruction
from .loops import COPY, PRODUCTS, SUM, Loop, count_pass, find_loops

KINDS = (
    "HMMA", "HGMMA", "LDSM", "LDS", "STS", "LDG", "STG", "LDGSTS", "MUFU.EX2", "FADD", "FMUL",
    "FFMA", "FMNMX", "FSEL", "FSETP", "SHFL", "REDUX", "BAR", "BSSY", "BRA",
)  # fmt: skip
COMMITTED = Path(__file__).parent / "sm_90.json"

WARP = 32
# Of a multiprocessor of capability 8.0, 9.0 and 10.0 (CUDA programming guide, table of compute
# capabilities): registers of a multiprocessor, and what they are given out in to a warp.
REGISTERS, REGISTERS_AT_ONCE = 65536, 256
MAX_WARPS, MAX_BLOCKS = 64, 32
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class MainLoop:
    """A loop around tensor-core products, or around a sum over a warp.

    Attributes:
        instructions: What a warp issues in one pass, inner loops aside.
        kinds: How many of these are of each of ``KINDS``; those that it has none of are left out.
        around: The same of the loops that it lies in, the innermost first, and of the rest of the
            kernel: the shortest way through this loop.
    """

    instructions: int
    kinds: dict[str, int]
    around: list[int]

    @property
    def products(self) -> int:
        return sum(self.kinds.get(kind, 0) for kind in PRODUCTS)


@dataclass(frozen=True)
class KernelCounts:
    """What one instance of a kernel is made of.

    Attributes:
        registers: Of a thread.
        stack: Bytes of a thread, where spilled registers lie.
        spills: Instructions that store registers there or load them.
        shared: Bytes of shared memory of a block that are reserved or static; what the launch adds
            is not known here.
        main_loops: In the order of the code.
        copies: Instructions per asynchronous copy of 16 bytes a thread, of each loop that does
            nothing else, in the order of the code.
        stores: The same of 16-byte stores to global memory.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    main_loops: list[MainLoop]
    copies: list[float]
    stores: list[float]


def blocks_per_multiprocessor(registers: int, shared: int, warps: int, architecture: int) -> int:
    """Blocks of so many warps that a multiprocessor holds at once.

    Args:
        registers: Of a thread.
        shared: Bytes of a block, those that the driver reserves included.
        warps: Of a block.
        architecture: 90 for capability 9.0.
    """
    of_warp = -(-registers * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    by_registers = REGISTERS // of_warp // warps
    by_shared = SHARED_BYTES[architecture] // max(shared, 1)
    return min(by_registers, by_shared, MAX_WARPS // warps, MAX_BLOCKS)


def count(code: list[Instruction], usage: dict[str, int]) -> KernelCounts:
    """The counts of a kernel.

    Args:
        code: Its instructions.
        usage: ``REG``, ``STACK`` and ``SHARED`` of it.
    """
    whole = find_loops(code)
    main_loops, copies, stores = [], [], []
    multiplies = any(code[index].kind in PRODUCTS for index in whole.body)
    kinds = PRODUCTS if multiplies else (SUM,)
    for *outer, loop in whole.below():
        of_pass = count_pass(code, loop)
        if any(of_pass[kind] for kind in kinds) and (multiplies or not loop.inner):
            main_loops.append(_main_loop(code, [*outer, loop], of_pass))
            continue
        if any(code[index].kind in PRODUCTS for index in loop.body):
            continue
        if of_pass[COPY]:
            of_copies = count_pass(code, loop, longest=True)
            copies.append(of_copies["instructions"] / of_copies[COPY])
        elif wide := sum(code[index].is_wide_store for index in loop.own):
            stores.append(of_pass["instructions"] / wide)
    reachable = [code[index].kind for index in whole.body]
    return KernelCounts(
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=sum(kind in ("STL", "LDL") for kind in reachable),
        shared=usage["SHARED"],
        main_loops=main_loops,
        copies=copies,
        stores=stores,
    )


def _main_loop(code: list[Instruction], chain: list[Loop], of_pass: Counter[str]) -> MainLoop:
    around = [
        count_pass(code, outer, inner)["instructions"]
        for outer, inner in zip(chain[-2::-1], chain[:0:-1], strict=True)
    ]
    kinds = {kind: of_pass[kind] for kind in KINDS if of_pass[kind]}
    return MainLoop(of_pass["instructions"], kinds, around)


def to_json(found: dict[str, KernelCounts], compiler: str) -> str:
    """The committed file's text; ``compiler`` is the release that the counts are of."""
    made = {name: asdict(each) for name, each in found.items()}
    return json.dumps({"compiler": compiler, "kernels": made}, indent=1) + "\n"


def committed() -> tuple[dict[str, KernelCounts], str]:
    """The counts that lie in the repository, and the release of nvcc that they are of.

    They are of sm_90, bfloat16 and heads of width 64; those backward are of width 80, those of
    relevance of float32 too.
    """
    content = json.loads(COMMITTED.read_text())
    found = {
        name: KernelCounts(
            **{**each, "main_loops": [MainLoop(**loop) for loop in each["main_loops"]]}
        )
        for name, each in content["kernels"].items()
    }
    return found, content["compiler"]


def lines(found: dict[str, KernelCounts]) -> Iterator[str]:
    """The counts in words."""
    for name, kernel in found.items():
        yield (
            f"{name}: {kernel.registers} registers, {kernel.stack} bytes of stack, "
            f"{kernel.spills} spills, {kernel.shared} bytes of shared memory before the launch's"
        )
        for loop in kernel.main_loops:
            kinds = ", ".join(f"{kind} {number}" for kind, number in loop.kinds.items())
            around = ", ".join(map(str, loop.around))
            yield f"  main loop: {loop.instructions} a pass, around it {around}: {kinds}"
        for what, costs in (("copy", kernel.copies), ("store", kernel.stores)):
            if costs:
                shown = ", ".join(f"{cost:g}" for cost in costs)
                yield f"  instructions per 16-byte {what}: {shown}"
