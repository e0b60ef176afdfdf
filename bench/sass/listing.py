"""Listings of nvdisasm: the instructions of each kernel, and how they follow one another."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SECTION = re.compile(r"^\.text\.(?P<symbol>\S+):$")
_LABEL = re.compile(r"^(?P<label>\S+):$")
_INSTRUCTION = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?\w+)\s+)?(?P<opcode>[A-Z][\w.]*)"
    r"\s*(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_TARGETS_OF_TABLE = re.compile(r'BRANCH_TARGETS (?P<labels>[^"]+)"')


class UnknownListing(ValueError):
    """A listing is not written as this module reads it."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, and the indices of those that can be next."""

    address: int
    opcode: str  # with its modifiers: MUFU.EX2
    next: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The opcode without modifiers, but for MUFU, which is many functions."""
        name, _, rest = self.opcode.partition(".")
        return f"{name}.{rest.split('.')[0]}" if name == "MUFU" else name

    @property
    def is_wide_store(self) -> bool:
        """Whether it stores 16 bytes a thread to global memory."""
        return self.kind == "STG" and ".128" in self.opcode


def kernels(text: str) -> dict[str, list[Instruction]]:
    """Mangled name -> instructions, of a listing by ``nvdisasm -c``.

    A kernel's subroutines (divisions) stand behind it. They come along, without a way to them: a
    call counts as the one instruction that it is.
    """
    found: dict[str, list[re.Match[str]]] = {}
    labels: dict[str, tuple[str, int]] = {}
    symbol = ""
    for line in text.splitlines():
        if match := _SECTION.match(line):
            symbol = match["symbol"]
            found[symbol] = []
        elif symbol and (match := _LABEL.match(line)):
            labels[match["label"]] = symbol, len(found[symbol])
        elif symbol and (match := _INSTRUCTION.match(line)):
            found[symbol].append(match)
    if not any(found.values()):
        raise UnknownListing("the listing holds no instruction of a kernel; is it nvdisasm's?")
    return {name: _linked(name, lines, labels) for name, lines in found.items() if lines}


def _linked(
    name: str, lines: list[re.Match[str]], labels: dict[str, tuple[str, int]]
) -> list[Instruction]:
    def index_of(label: str) -> int:
        place = labels.get(label.strip())
        if place is None or place[0] != name:
            raise UnknownListing(f"{name}: a branch to {label}, which is no place in it")
        return place[1]

    result = []
    for index, line in enumerate(lines):
        opcode, operands = line["opcode"], line["operands"]
        target = _TARGET.search(operands)
        # A branch may ask a second predicate, or whether its warp has diverged, in an operand.
        is_conditional = line["predicate"] is not None or bool(
            target and operands[: target.start()].strip()
        )
        nexts: set[int] = set()
        match opcode.split(".")[0]:
            case "BRA" if target:
                nexts = {index_of(target["label"])}
            case "BRX" | "BRXU" | "BRA" | "JMP" | "JMX":
                table = _TARGETS_OF_TABLE.search(operands)
                if table is None:
                    raise UnknownListing(f"{name}: {line['address']}: a branch without targets")
                nexts = {index_of(label) for label in table["labels"].split(",")}
            case "EXIT" | "RET":
                pass
            case _:
                # BSYNC too: where lanes meet again follows right behind it.
                is_conditional = True
        if is_conditional and index + 1 < len(lines):
            nexts.add(index + 1)
        result.append(Instruction(int(line["address"], 16), opcode, tuple(sorted(nexts))))
    return result


_TEMPLATE_ARGUMENT = re.compile(r"(?P<float>f)|L[a-z](?P<number>\d+)E|NS\d*_(?P<length>\d+)")


def readable(symbol: str) -> str:
    """``attention_forward_kernel<bfloat16, 64>`` for a mangled name, without its namespaces.

    Of template arguments it reads what kernels here have: float, types of one namespace, numbers.
    """
    name, rest = symbol, symbol.removeprefix("_Z").removeprefix("N")
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
        while rest[:1] == "S" and (substitution := re.match(r"S\d*_", rest)):
            rest = rest[substitution.end() :]
    arguments = []
    if rest.startswith("I"):
        rest = rest[1:]
        while match := _TEMPLATE_ARGUMENT.match(rest):
            rest = rest[match.end() :]
            if match["length"]:
                length = int(match["length"])
                arguments.append(rest[:length])
                rest = rest[length:].removeprefix("E")
            else:
                arguments.append(match["number"] or "float")
    return f"{name}<{', '.join(arguments)}>" if arguments else name
