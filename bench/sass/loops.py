"""The loops of a kernel, and what one pass through each of them issues.

A loop is a natural one: a jump back to an instruction that lies on every way from the kernel's
start to the jump, and all that can reach the jump without passing that instruction. So it does not
matter where the compiler has put a loop's parts. A main loop is one in which tensor cores multiply
outside of its inner loops or, in a kernel that multiplies nothing, an innermost one in which the
lanes of a warp add up integers.

Not all that a loop holds is issued in each pass: parts serve rows that are not aligned, the first
pass, or lanes that diverged. So a pass is counted along one way through the loop: the one with the
most tensor-core products, among those with the most asynchronous copies, then with the most 16-byte
stores to global memory, then with the fewest other accesses to memory, and of these the shortest.
For a loop that only copies it is the longest of these: shorter ones are for rows that do not exist.
Inner loops on the way count nothing. Instructions whose predicate is false take their turn all the
same, and count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .listing import Instruction, UnknownListing

PRODUCTS = ("HMMA", "HGMMA")
COPY, SUM = "LDGSTS", "REDUX"

_ACCESSES = ("LDG", "STG", "STS")

# Of a way: whether it passes a given loop, products, copies, 16-byte stores, other accesses as a
# negative number, length, which is negative where the shortest is wanted.
Rank = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class Loop:
    """A loop, by indices of instructions; the whole kernel is the outermost.

    Attributes:
        header: Where a pass begins.
        body: Everything in it.
        ends: Where a pass ends: at jumps back to the header, or where the kernel ends.
        inner: The loops right inside.
    """

    header: int
    body: frozenset[int]
    ends: frozenset[int]
    inner: tuple[Loop, ...]

    @property
    def own(self) -> frozenset[int]:
        """What lies in no inner loop."""
        return self.body.difference(*(loop.body for loop in self.inner))

    def below(self) -> Iterator[tuple[Loop, ...]]:
        """Each loop inside, in the order of the code, behind those that it lies in."""
        for loop in sorted(self.inner, key=lambda each: each.header):
            yield self, loop
            yield from ((self, *chain) for chain in loop.below())


def find_loops(code: list[Instruction]) -> Loop:
    """The kernel as a loop of its own, with the loops inside it."""
    order = _reverse_postorder(code)
    position = {index: place for place, index in enumerate(order)}
    before: dict[int, list[int]] = {index: [] for index in order}
    for index in order:
        for following in code[index].next:
            before[following].append(index)
    dominator = _dominators(order, position, before)

    def dominates(first: int, second: int) -> bool:
        while position[second] > position[first]:
            second = dominator[second]
        return first == second

    ends: dict[int, set[int]] = {}
    for index in order:
        for following in code[index].next:
            if dominates(following, index):
                ends.setdefault(following, set()).add(index)
    bodies = {header: _natural_loop(header, found, before) for header, found in ends.items()}

    def build(header: int, body: frozenset[int], finish: Collection[int]) -> Loop:
        within = {h: b for h, b in bodies.items() if h != header and b <= body}
        inner = tuple(
            build(h, b, ends[h])
            for h, b in within.items()
            if not any(b < other for other in within.values())
        )
        return Loop(header, body, frozenset(finish), inner)

    exits = {index for index in order if not code[index].next}
    exits |= {index for index in order if code[index].opcode.startswith("EXIT")}
    if 0 in bodies:
        raise UnknownListing("a kernel that begins within a loop")
    return build(0, frozenset(order), exits)


def _reverse_postorder(code: list[Instruction]) -> list[int]:
    order, seen = [], {0}
    stack = [(0, iter(code[0].next))]
    while stack:
        index, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(code[following].next)))
                break
        else:
            order.append(index)
            stack.pop()
    return order[::-1]


def _dominators(
    order: list[int], position: dict[int, int], before: dict[int, list[int]]
) -> dict[int, int]:
    """The nearest instruction that all ways to an instruction pass (Cooper, Harvey, Kennedy)."""
    found = {order[0]: order[0]}
    has_changed = True
    while has_changed:
        has_changed = False
        for index in order[1:]:
            known = [each for each in before[index] if each in found]
            nearest = known[0]
            for other in known[1:]:
                while nearest != other:
                    if position[nearest] > position[other]:
                        nearest = found[nearest]
                    else:
                        other = found[other]
            if found.get(index) != nearest:
                found[index] = nearest
                has_changed = True
    return found


def _natural_loop(
    header: int, ends: Collection[int], before: dict[int, list[int]]
) -> frozenset[int]:
    body, waiting = {header}, list(ends)
    while waiting:
        index = waiting.pop()
        if index not in body:
            body.add(index)
            waiting += before[index]
    return frozenset(body)


def count_pass(
    code: list[Instruction], loop: Loop, through: Loop | None = None, *, longest: bool = False
) -> Counter[str]:
    """Kinds of the instructions that a pass issues, and ``instructions``, their number.

    Args:
        code: The kernel.
        loop: The loop, or the whole kernel.
        through: An inner loop that the way has to pass.
        longest: Take the longest of the ways that are equal else, not the shortest.
    """
    # An inner loop is one node: its header, which may lead to whatever the loop leaves for.
    node = {index: index for index in loop.body}
    for inner in loop.inner:
        node |= dict.fromkeys(inner.body, inner.header)
    insides = {inner.header: inner for inner in loop.inner}
    following: dict[int, set[int]] = {place: set() for place in node.values()}
    for index in loop.body:
        for each in code[index].next:
            if each in loop.body and each != loop.header and node[each] != node[index]:
                following[node[index]].add(node[each])

    def rank(place: int) -> Rank:
        if place in insides:
            return (int(insides[place] is through), 0, 0, 0, 0, 0)
        one = code[place]
        return (
            0,
            int(one.kind in PRODUCTS),
            int(one.kind == COPY),
            int(one.is_wide_store),
            -int(one.kind in _ACCESSES and not one.is_wide_store),
            1 if longest else -1,
        )

    best: dict[int, tuple[Rank, int | None]] = {loop.header: (rank(loop.header), None)}
    order = _topological(loop.header, following)
    position = {place: number for number, place in enumerate(order)}
    for place in order:
        for each in following[place]:
            if position[each] <= position[place]:
                raise UnknownListing(f"{code[each].address:#x}: a jump into the middle of a loop")
            there = _sum(best[place][0], rank(each))
            if each not in best or there > best[each][0]:
                best[each] = there, place
    finished = [node[end] for end in loop.ends if node[end] in best]
    step: int | None = max(finished, key=lambda end: best[end][0])
    counts: Counter[str] = Counter()
    while step is not None:
        if step not in insides:
            counts[code[step].kind] += 1
            counts["instructions"] += 1
        step = best[step][1]
    return counts


def _sum(first: Rank, second: Rank) -> Rank:
    a, b, c, d, e, f = (left + right for left, right in zip(first, second, strict=True))
    return a, b, c, d, e, f


def _topological(start: int, following: dict[int, set[int]]) -> list[int]:
    order: list[int] = []
    seen = {start}
    stack = [(start, iter(following[start]))]
    while stack:
        place, rest = stack[-1]
        for each in rest:
            if each not in seen:
                seen.add(each)
                stack.append((each, iter(following[each])))
                break
        else:
            order.append(place)
            stack.pop()
    return order[::-1]
