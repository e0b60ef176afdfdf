"""The targets that the kernels and the few-shot engine are meant to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from tir_kernels.files import MIB

from .counting import fused_memory
from .peers import COMPILED, COMPILED_SDPA, EAGER, FLEX, MASKED, UNWEIGHTED
from .records import Record
from .settings import HOST_TIME, OURS, PUBLISHED, START_UP, STEP, WHOLE_RUN
from .shapes import Point
from .suites.operators import OPERATORS

Case = dict[str, Record]  # implementation -> record, of one case
# Ours, and the case it belongs to -> a number; None where a peer is missing.
Value = Callable[[Record, Case], "float | None"]
# Keys of records and names of sizes, "B·H" being the product of two -> the value, a pattern of
# words such as "whole run*", or some values.
Rows = Mapping[str, "str | int | range | tuple"]


class Measure(NamedTuple):
    """A number that a target limits, the unit it is shown in, and whether less of it is better."""

    of: Value
    unit: str = "×"
    is_upper: bool = False


class Target(NamedTuple):
    """A limit on a number, for all records of ours among some rows.

    Attributes:
        what: The number in words.
        limit: The most that the number may be, or the least if its measure is no ``is_upper``.
        measure: The number, from a record.
        rows: The records.
    """

    what: str
    limit: float
    measure: Measure
    rows: Rows

    def concerns(self, record: Record) -> bool:
        shape = record["shape"]
        facts = record | shape | {"B·H": shape.get("B", 1) * shape.get("H", 1)}
        return all(
            name in facts and _is_among(facts[name], wanted) for name, wanted in self.rows.items()
        )

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.measure.is_upper else value >= self.limit


def _is_among(value: Any, wanted: str | int | range | tuple) -> bool:
    if isinstance(wanted, str):
        return fnmatchcase(value, wanted)
    return value == wanted if isinstance(wanted, int) else value in wanted


def _speed(record: Record, peers: Iterable[Record]) -> float | None:
    """Shortest time of some peers over ours: above 1 ours is faster."""
    theirs = [peer["ms"] for peer in peers if peer["ms"]]
    return min(theirs) / record["ms"] if theirs and record["ms"] else None


def _named(case: Case, *names: str) -> list[Record]:
    """The records of implementations whose names start so."""
    return [record for name, record in case.items() if name.startswith(names)]


def speed_against(*names: str) -> Measure:
    return Measure(lambda record, case: _speed(record, _named(case, *names)))


def time_against(*names: str) -> Measure:
    """Our time over that of the fastest of some peers: below 1 ours is faster."""

    def value(record: Record, case: Case) -> float | None:
        speed = _speed(record, _named(case, *names))
        return None if speed is None else 1 / speed

    return Measure(value, is_upper=True)


def _against_best(record: Record, case: Case) -> float | None:
    """The speed against all peers that compute the same."""
    return _speed(record, [r for n, r in case.items() if not n.startswith((OURS, UNWEIGHTED))])


def _time(per_millisecond: float, unit: str) -> Measure:
    """Our time in another unit."""
    return Measure(lambda r, case: r["ms"] and r["ms"] * per_millisecond, unit, is_upper=True)


def _share_of_published_memory(record: Record, case: Case) -> float | None:
    """Our peak memory as a share of the published program's in its leanest type."""
    theirs = [peer["mib"] for peer in _named(case, PUBLISHED) if peer.get("mib")]
    return record["mib"] / min(theirs) if theirs and record.get("mib") is not None else None


def _share_of_fused_memory(record: Record, case: Case) -> float | None:
    if record.get("mib") is None:
        return None
    sizes, dtype = record["shape"], record["dtype"]
    point = Point(sizes["L"], sizes["d"], sizes["B"], sizes["H"], sizes["C"], dtype)
    return record["mib"] * MIB / fused_memory(point, record["direction"])


_FRACTION = Measure(lambda record, case: record["fraction_of_bound"], "%")
_OVER_PUBLISHED, _OVER_MASKED = speed_against(PUBLISHED), speed_against(MASKED)
_OVER_FLOAT32 = speed_against(f"{PUBLISHED}float32")

_MANY = 2**31
_BFLOAT16, _FLOAT32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
_MAIN_SIZES = _BFLOAT16 | {"d": 64, "L": range(50, 578), "B·H": range(300, _MANY)}
_FORWARD = {"suite": "attention", "direction": "forward"}
_BACKWARD = {"suite": "attention", "direction": "backward"}
_BOTH = {"suite": "attention", "direction": "forward+backward"}
_TOKEN_WEIGHTS = {"suite": "relevance", "operator": "token_weights"}
_WHOLE_OPERATOR = {"operator": "reweighted_attention"}
_VIT_B = {"L": 197, "D": 768}
# Steps with five images, one episode at a time.
_STEPS = {"suite": "step", "operator": f"{STEP}, placement tokens", "B": 5} | _VIT_B
# Five-way episodes, at the method's settings, of a transformer with 197 tokens.
_RUNS = {"suite": "episodes", "operator": f"{WHOLE_RUN}*", "ways": 5, "queries": 15, "steps": 100}
_RUNS_OF_VIT_B, _RUNS_OF_VIT_TI = _RUNS | _VIT_B, _RUNS | {"L": 197, "D": 192}

_OF_ATTENTION = (
    ("the fastest unweighted attention", UNWEIGHTED, 1.0),
    ("SDPA with a mask", MASKED, 0.6),
    ("FlexAttention", FLEX, 0.6),
)
_OF_TOKEN_WEIGHTS = (("eager", EAGER, 0.2), ("torch.compile", COMPILED, 0.5))
_OF_THE_WHOLE = (("eager", EAGER, 0.4), ("torch.compile with SDPA", COMPILED_SDPA, 0.65))

# On a GPU: the number in words, its rows, and the peers: in words, as in the records, and the most
# of their time that ours may take.
_AGAINST_PEERS = (
    ("attention forward", _FORWARD | _MAIN_SIZES, _OF_ATTENTION),
    ("attention backward", _BACKWARD | _MAIN_SIZES, _OF_ATTENTION),
    (
        "token_weights of ViT-B/16",
        _TOKEN_WEIGHTS | _BFLOAT16 | _VIT_B | {"E": 512, "C": 5, "B": (25, 64)},
        _OF_TOKEN_WEIGHTS,
    ),
    (
        "reweighted_attention forward + backward",
        _BOTH | _WHOLE_OPERATOR | _BFLOAT16 | {"suite": "operator"},
        _OF_THE_WHOLE,
    ),
)
_SPEED = "speed against the published program"
_ON_ANY_DEVICE = (
    Target(
        "fine-tuning step, peak memory against the published program",
        0.5,
        Measure(_share_of_published_memory, is_upper=True),
        {"suite": "memory", "operator": STEP},
    ),
    Target(
        "start-up to the first step, files in cache",
        10.0,
        _time(1e-3, "s"),
        {"suite": "episodes", "operator": f"{START_UP}*"},
    ),
)

TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        *(
            Target(f"{what}, against {peer}", limit, time_against(name), rows)
            for what, rows, peers in _AGAINST_PEERS
            for peer, name, limit in peers
        ),
        Target(
            "attention forward, share of the bound, B·H ≥ 768",
            0.6,
            _FRACTION,
            _FORWARD | _MAIN_SIZES | {"B·H": range(768, _MANY)},
        ),
        Target("host time of a call", 15.0, _time(1e3, "µs"), {"operator": f"* {HOST_TIME}"}),
        Target(
            "memory of the fused operator, against outputs, statistics and (B, C, N)",
            1.01,  # the allocator rounds up
            Measure(_share_of_fused_memory, is_upper=True),
            _WHOLE_OPERATOR | {"suite": "memory"},
        ),
        *(
            Target(
                f"whole run, 5-way {shots}-shot, ViT-B/16, {_SPEED}",
                limit,
                _OVER_PUBLISHED,
                _RUNS_OF_VIT_B | {"shots": shots},
            )
            for shots, limit in ((5, 10.0), (1, 20.0))
        ),
        Target(
            "whole run, 5-way 5-shot, ViT-B/16, model FLOPs over the rate of a large product",
            0.4,
            _FRACTION,
            _RUNS_OF_VIT_B | {"shots": 5},
        ),
        *_ON_ANY_DEVICE,
    ),
    "cpu": (
        *(
            Target(f"attention {what}, speed against SDPA with a mask", limit, _OVER_MASKED, rows)
            for what, limit, rows in (
                ("forward float32", 1.0, _FORWARD | _FLOAT32),
                ("forward + backward float32", 1.2, _BOTH | _FLOAT32),
                ("forward bfloat16", 2.0, _FORWARD | _BFLOAT16),
                ("forward + backward bfloat16", 2.0, _BOTH | _BFLOAT16),
            )
        ),
        Target("token_weights, speed against eager", 1.5, speed_against(EAGER), _TOKEN_WEIGHTS),
        Target(
            "every operator, speed against the best peer",
            0.95,
            Measure(_against_best),
            {"suite": ("attention", "relevance", "operator"), "operator": tuple(OPERATORS)},
        ),
        Target(
            f"step in float32, ViT-B/16, 5 images, {_SPEED}",
            2.2,
            _OVER_FLOAT32,
            _STEPS | _FLOAT32,
        ),
        Target(
            f"step in bfloat16, ViT-B/16, 5 images, {_SPEED} in float32, which is what it runs in "
            "on a CPU",
            4.0,
            _OVER_FLOAT32,
            _STEPS | _BFLOAT16,
        ),
        Target(
            f"whole run, 5-way 5-shot, ViT-Ti/16 in float32, {_SPEED}",
            3.0,
            _OVER_FLOAT32,
            _RUNS_OF_VIT_TI | _FLOAT32 | {"shots": 5},
        ),
        *_ON_ANY_DEVICE,
    ),
}
