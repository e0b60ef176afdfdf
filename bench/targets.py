"""What the kernels are meant to reach, and how far the records are from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .counting import fused_memory
from .memory_probe import MIB
from .peers.attention import FLEX, MASKED, UNWEIGHTED
from .peers.common import COMPILED, EAGER
from .peers.operator import COMPILED_SDPA
from .records import Record, case_key
from .settings import DTYPES, OURS
from .shapes import PREFIX_TOKENS
from .suites.operator import HOST_TIME
from .tables import Section, shape_text

Case = dict[str, Record]  # implementation -> record, of one case
# Ours, and the case it belongs to -> the number a target limits; None where a peer is missing.
Measure = Callable[[Record, Case], "float | None"]

_READABLE = f"{OURS}reference"  # no target: it is there to be read
_SHOWN_SHAPES = 4


@dataclass(frozen=True)
class Target:
    """A limit on a number, for all records of ours that it applies to."""

    what: str
    limit: float
    at_most: bool
    applies: Callable[[Record], bool]
    measure: Measure
    unit: str = "×"

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Finding:
    """A target and one implementation of ours: the value at each shape, the worst first."""

    target: Target
    implementation: str
    values: list[tuple[float, Record]]

    @property
    def worst(self) -> tuple[float, Record]:
        return self.values[0]

    @property
    def falls_short_at(self) -> list[Record]:
        return [record for value, record in self.values if not self.target.is_met(value)]


def findings(records: Iterable[Record], device: str) -> list[Finding | Target]:
    """For each target a finding per backend that was measured, or the target itself if none was."""
    cases: dict[tuple, Case] = {}
    for record in records:
        if record["device"] == device:
            cases.setdefault(case_key(record), {})[record["implementation"]] = record
    result: list[Finding | Target] = []
    for target in TARGETS[device]:
        values: dict[str, list[tuple[float, Record]]] = {}
        for case in cases.values():
            for name, record in case.items():
                if not name.startswith(OURS) or name == _READABLE or not target.applies(record):
                    continue
                value = target.measure(record, case)
                if value is not None:
                    values.setdefault(name, []).append((value, record))
        for name, found in values.items():
            worst_first = sorted(found, key=lambda pair: pair[0], reverse=target.at_most)
            result.append(Finding(target, name, worst_first))
        if not values:
            result.append(target)
    return result


def summary(records: Iterable[Record], device: str, *, only_measured: bool = False) -> Section:
    """Each target, the worst value measured, and the shapes where it falls short."""
    columns = ("target", "limit", "implementation", "worst", "at", "met", "falls short at")
    found = findings(records, device)
    rows = [_row(f) for f in found if isinstance(f, Finding) or not only_measured]
    return Section(f"Targets on {device}", columns, blocks=[[row] for row in rows])


def _row(finding: Finding | Target) -> tuple[str, ...]:
    if isinstance(finding, Target):
        return finding.what, _limit(finding), "–", "not measured", "", "", ""
    target = finding.target
    value, record = finding.worst
    short = finding.falls_short_at
    met = f"{len(finding.values) - len(short)} of {len(finding.values)}"
    named = [_where(r) for r in short[:_SHOWN_SHAPES]]
    if len(short) > _SHOWN_SHAPES:
        named.append(f"and {len(short) - _SHOWN_SHAPES} more")
    return (
        target.what,
        _limit(target),
        finding.implementation,
        _value(value, target),
        _where(record),
        met,
        "; ".join(named) or "nowhere",
    )


def _limit(target: Target) -> str:
    return f"{'≤' if target.at_most else '≥'} {_value(target.limit, target)}"


def _value(value: float, target: Target) -> str:
    if target.unit == "%":
        return f"{100 * value:.0f} %"
    return f"{value:.1f} {target.unit}" if target.unit == "µs" else f"{value:.2f}{target.unit}"


def _where(record: Record) -> str:
    return f"{record['operator']} {record['direction']} {record['dtype']} {shape_text(record)}"


def _ms(record: Record | None) -> float | None:
    return None if record is None else record["ms"]


def _fastest(case: Case, names: tuple[str, ...]) -> float | None:
    """The shortest time of peers whose names start so."""
    times = [r["ms"] for name, r in case.items() if name.startswith(names) and r["ms"] is not None]
    return min(times, default=None)


def time_against(*names: str) -> Measure:
    """Our time over that of the fastest of some peers: below 1 ours is faster."""

    def measure(record: Record, case: Case) -> float | None:
        ours, theirs = record["ms"], _fastest(case, names)
        return None if ours is None or theirs is None else ours / theirs

    return measure


def speed_against(*names: str) -> Measure:
    """Time of the fastest of some peers over ours: above 1 ours is faster."""

    def measure(record: Record, case: Case) -> float | None:
        share = time_against(*names)(record, case)
        return None if share is None else 1 / share

    return measure


def speed_against_best(record: Record, case: Case) -> float | None:
    """As :func:`speed_against`, with all peers that compute the same."""
    names = tuple(n for n in case if not n.startswith((OURS, UNWEIGHTED)))
    return speed_against(*names)(record, case) if names else None


def _fraction(record: Record, case: Case) -> float | None:
    return record["fraction_of_bound"]


def _microseconds(record: Record, case: Case) -> float | None:
    return None if record["ms"] is None else 1e3 * record["ms"]


def _share_of_fused_memory(record: Record, case: Case) -> float | None:
    if record.get("mib") is None:
        return None
    sizes = [record["shape"][name] for name in ("B", "H", "L", "d")]
    itemsize = DTYPES[record["dtype"]].itemsize
    allowed = fused_memory(
        *sizes, PREFIX_TOKENS, record["shape"]["C"], itemsize, record["direction"]
    )
    return record["mib"] * MIB / allowed


def _attention(direction: str, dtype: str = "bfloat16") -> Callable[[Record], bool]:
    def applies(record: Record) -> bool:
        return (
            record["suite"] == "attention"
            and record["dtype"] == dtype
            and record["direction"] == direction
        )

    return applies


def _main_attention(direction: str, least_heads: int = 300) -> Callable[[Record], bool]:
    def applies(record: Record) -> bool:
        shape = record["shape"]
        return (
            _attention(direction)(record)
            and shape["d"] == 64
            and 50 <= shape["L"] <= 577
            and shape["B"] * shape["H"] >= least_heads
        )

    return applies


def _main_token_weights(record: Record) -> bool:
    shape = record["shape"]
    sizes = {"L": 197, "D": 768, "E": 512, "C": 5}
    return (
        record["operator"] == "token_weights"
        and record["suite"] == "relevance"
        and record["dtype"] == "bfloat16"
        and shape["B"] in (25, 64)
        and all(shape[name] == size for name, size in sizes.items())
    )


def _main_operator(record: Record) -> bool:
    return (
        record["suite"] == "operator"
        and record["operator"] == "reweighted_attention"
        and record["direction"] == "forward+backward"
        and record["dtype"] == "bfloat16"
    )


def _cpu_token_weights(record: Record) -> bool:
    return record["suite"] == "relevance" and record["operator"] == "token_weights"


def _cpu_operators(record: Record) -> bool:
    is_timed = record["suite"] in ("attention", "relevance", "operator")
    return is_timed and HOST_TIME not in record["operator"]


def _host_time(record: Record) -> bool:
    return HOST_TIME in record["operator"]


def _fused(record: Record) -> bool:
    return record["suite"] == "memory" and record["operator"] == "reweighted_attention"


_BY_DIRECTION = tuple(
    target
    for direction in ("forward", "backward")
    for target in (
        Target(
            f"attention {direction}, against the fastest unweighted attention",
            1.0,
            True,
            _main_attention(direction),
            time_against(UNWEIGHTED),
        ),
        Target(
            f"attention {direction}, against SDPA with a mask",
            0.6,
            True,
            _main_attention(direction),
            time_against(MASKED),
        ),
        Target(
            f"attention {direction}, against FlexAttention",
            0.6,
            True,
            _main_attention(direction),
            time_against(FLEX),
        ),
    )
)
_TOKEN_WEIGHTS = "token_weights of ViT-B/16, against"
_WHOLE = "reweighted_attention forward + backward, against"

TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        *_BY_DIRECTION,
        Target(f"{_TOKEN_WEIGHTS} eager", 0.2, True, _main_token_weights, time_against(EAGER)),
        Target(
            f"{_TOKEN_WEIGHTS} torch.compile",
            0.5,
            True,
            _main_token_weights,
            time_against(COMPILED),
        ),
        Target(f"{_WHOLE} eager", 0.4, True, _main_operator, time_against(EAGER)),
        Target(
            f"{_WHOLE} torch.compile with SDPA",
            0.65,
            True,
            _main_operator,
            time_against(COMPILED_SDPA),
        ),
        Target(
            "attention forward, share of the bound, B·H ≥ 768",
            0.6,
            False,
            _main_attention("forward", 768),
            _fraction,
            unit="%",
        ),
        Target("host time of a call", 15.0, True, _host_time, _microseconds, unit="µs"),
        Target(
            # The allocator rounds up.
            "memory of the fused operator, against outputs, statistics and (B, C, N)",
            1.01,
            True,
            _fused,
            _share_of_fused_memory,
        ),
    ),
    "cpu": (
        Target(
            "attention forward float32, speed against SDPA with a mask",
            1.0,
            False,
            _attention("forward", "float32"),
            speed_against(MASKED),
        ),
        Target(
            "attention forward + backward float32, speed against SDPA with a mask",
            1.2,
            False,
            _attention("forward+backward", "float32"),
            speed_against(MASKED),
        ),
        Target(
            "attention forward bfloat16, speed against SDPA with a mask",
            2.0,
            False,
            _attention("forward"),
            speed_against(MASKED),
        ),
        Target(
            "attention forward + backward bfloat16, speed against SDPA with a mask",
            2.0,
            False,
            _attention("forward+backward"),
            speed_against(MASKED),
        ),
        Target(
            "token_weights, speed against eager",
            1.5,
            False,
            _cpu_token_weights,
            speed_against(EAGER),
        ),
        Target(
            "every operator, speed against the best peer",
            0.95,
            False,
            _cpu_operators,
            speed_against_best,
        ),
    ),
}
