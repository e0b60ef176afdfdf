"""The targets that the kernels and the few-shot engine are meant to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .counting import fused_memory
from .memory_probe import MIB
from .peers.attention import FLEX, MASKED, UNWEIGHTED
from .peers.common import COMPILED, EAGER
from .peers.operator import COMPILED_SDPA
from .records import Record
from .settings import OURS, PUBLISHED
from .shapes import Point
from .suites.episodes import START_UP, WHOLE_RUN
from .suites.operator import HOST_TIME
from .suites.step import STEP

Case = dict[str, Record]  # implementation -> record, of one case
# Ours, and the case it belongs to -> the number a target limits; None where a peer is missing.
Measure = Callable[[Record, Case], "float | None"]


@dataclass(frozen=True)
class Rows:
    """The records that a target is about.

    Args:
        suites: Names of suites.
        operators: Patterns of operators' names, such as "whole run*"; all by default.
        dtype: The type; any by default.
        direction: The direction; any by default.
        sizes: Sizes that the shape has, each exactly or out of some; "B·H" is the product of two.
    """

    suites: tuple[str, ...]
    operators: tuple[str, ...] = ("*",)
    dtype: str | None = None
    direction: str | None = None
    sizes: Mapping[str, int | range | tuple[int, ...]] = field(default_factory=dict)

    def __contains__(self, record: Record) -> bool:
        shape = record["shape"]
        if "H" in shape:
            shape = shape | {"B·H": shape["B"] * shape["H"]}
        return (
            record["suite"] in self.suites
            and any(fnmatchcase(record["operator"], pattern) for pattern in self.operators)
            and self.dtype in (None, record["dtype"])
            and self.direction in (None, record["direction"])
            and all(_is_among(shape[name], wanted) for name, wanted in self.sizes.items())
        )


def _is_among(size: int, wanted: int | range | tuple[int, ...]) -> bool:
    return size == wanted if isinstance(wanted, int) else size in wanted


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit on a number, for all records of ours among some rows; one of the limits is given."""

    what: str
    rows: Rows
    measure: Measure
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "×"

    @property
    def is_upper(self) -> bool:
        return self.at_most is not None

    @property
    def limit(self) -> float:
        limit = self.at_most if self.is_upper else self.at_least
        assert limit is not None
        return limit

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.is_upper else value >= self.limit


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
    """The :func:`speed_against` all peers that compute the same."""
    names = tuple(n for n in case if not n.startswith((OURS, UNWEIGHTED)))
    return speed_against(*names)(record, case) if names else None


def _fraction(record: Record, case: Case) -> float | None:
    return record["fraction_of_bound"]


def _microseconds(record: Record, case: Case) -> float | None:
    return None if record["ms"] is None else 1e3 * record["ms"]


def _seconds(record: Record, case: Case) -> float | None:
    return None if record["ms"] is None else record["ms"] / 1e3


def _share_of_published_memory(record: Record, case: Case) -> float | None:
    """Our peak memory as a share of the published program's in its leanest type."""
    peaks = [r.get("mib") for name, r in case.items() if name.startswith(PUBLISHED)]
    found = [peak for peak in peaks if peak is not None]
    ours = record.get("mib")
    return None if ours is None or not found else ours / min(found)


def _share_of_fused_memory(record: Record, case: Case) -> float | None:
    if record.get("mib") is None:
        return None
    sizes, dtype = record["shape"], record["dtype"]
    point = Point(sizes["L"], sizes["d"], sizes["B"], sizes["H"], sizes["C"], dtype)
    return record["mib"] * MIB / fused_memory(point, record["direction"])


_MANY = 2**31
_MAIN_SIZES = {"d": 64, "L": range(50, 578), "B·H": range(300, _MANY)}
_VIT_B = {"L": 197, "D": 768}
_EPISODE = {"ways": 5, "queries": 15, "steps": 100, "L": 197}


def _whole_runs(width: int, shots: int, dtype: str | None = None) -> Rows:
    """Five-way episodes, at the method's settings, of a transformer with 197 tokens of a width."""
    sizes = _EPISODE | {"D": width, "shots": shots}
    return Rows(("episodes",), (f"{WHOLE_RUN}*",), dtype, sizes=sizes)


def _attention(direction: str, dtype: str, sizes: Mapping[str, int | range] | None = None) -> Rows:
    return Rows(("attention",), dtype=dtype, direction=direction, sizes=sizes or {})


def _main_attention(direction: str) -> Rows:
    return _attention(direction, "bfloat16", _MAIN_SIZES)


def _steps(dtype: str) -> Rows:
    """Steps with five images, one episode at a time."""
    return Rows(("step",), (f"{STEP}, placement tokens",), dtype, sizes=_VIT_B | {"B": 5})


_MAIN_TOKEN_WEIGHTS = Rows(
    ("relevance",), ("token_weights",), "bfloat16", sizes=_VIT_B | {"E": 512, "C": 5, "B": (25, 64)}
)
_MAIN_OPERATOR = Rows(("operator",), ("reweighted_attention",), "bfloat16", "forward+backward")
_OPERATORS = ("weighted_attention", "reweighted_attention", "token_relevance", "token_weights")

# Peers on a GPU: in words, as in the records, and the most of its time that ours may take.
_OF_ATTENTION = (
    ("the fastest unweighted attention", UNWEIGHTED, 1.0),
    ("SDPA with a mask", MASKED, 0.6),
    ("FlexAttention", FLEX, 0.6),
)
_OF_TOKEN_WEIGHTS = (("eager", EAGER, 0.2), ("torch.compile", COMPILED, 0.5))
_OF_THE_WHOLE = (("eager", EAGER, 0.4), ("torch.compile with SDPA", COMPILED_SDPA, 0.65))

_ON_ANY_DEVICE = (
    Target(
        what="fine-tuning step, peak memory against the published program",
        at_most=0.5,
        rows=Rows(("memory",), (STEP,)),
        measure=_share_of_published_memory,
    ),
    Target(
        what="start-up to the first step, files in cache",
        at_most=10.0,
        rows=Rows(("episodes",), (f"{START_UP}*",)),
        measure=_seconds,
        unit="s",
    ),
)

TARGETS: dict[str, tuple[Target, ...]] = {
    "cuda": (
        *(
            Target(
                what=f"{what}, against {peer}",
                at_most=limit,
                rows=rows,
                measure=time_against(name),
            )
            for what, rows, peers in (
                ("attention forward", _main_attention("forward"), _OF_ATTENTION),
                ("attention backward", _main_attention("backward"), _OF_ATTENTION),
                ("token_weights of ViT-B/16", _MAIN_TOKEN_WEIGHTS, _OF_TOKEN_WEIGHTS),
                ("reweighted_attention forward + backward", _MAIN_OPERATOR, _OF_THE_WHOLE),
            )
            for peer, name, limit in peers
        ),
        Target(
            what="attention forward, share of the bound, B·H ≥ 768",
            at_least=0.6,
            rows=_attention("forward", "bfloat16", _MAIN_SIZES | {"B·H": range(768, _MANY)}),
            measure=_fraction,
            unit="%",
        ),
        Target(
            what="host time of a call",
            at_most=15.0,
            rows=Rows(("operator",), (f"* {HOST_TIME}",)),
            measure=_microseconds,
            unit="µs",
        ),
        Target(
            what="memory of the fused operator, against outputs, statistics and (B, C, N)",
            at_most=1.01,  # the allocator rounds up
            rows=Rows(("memory",), ("reweighted_attention",)),
            measure=_share_of_fused_memory,
        ),
        *(
            Target(
                what=f"whole run, 5-way {shots}-shot, ViT-B/16, "
                "speed against the published program",
                at_least=limit,
                rows=_whole_runs(768, shots),
                measure=speed_against(PUBLISHED),
            )
            for shots, limit in ((5, 10.0), (1, 20.0))
        ),
        Target(
            what="whole run, 5-way 5-shot, ViT-B/16, model FLOPs over the rate of a large product",
            at_least=0.4,
            rows=_whole_runs(768, 5),
            measure=_fraction,
            unit="%",
        ),
        *_ON_ANY_DEVICE,
    ),
    "cpu": (
        *(
            Target(
                what=f"attention {shown} {dtype}, speed against SDPA with a mask",
                at_least=limit,
                rows=_attention(direction, dtype),
                measure=speed_against(MASKED),
            )
            for shown, direction, dtype, limit in (
                ("forward", "forward", "float32", 1.0),
                ("forward + backward", "forward+backward", "float32", 1.2),
                ("forward", "forward", "bfloat16", 2.0),
                ("forward + backward", "forward+backward", "bfloat16", 2.0),
            )
        ),
        Target(
            what="token_weights, speed against eager",
            at_least=1.5,
            rows=Rows(("relevance",), ("token_weights",)),
            measure=speed_against(EAGER),
        ),
        Target(
            what="every operator, speed against the best peer",
            at_least=0.95,
            rows=Rows(("attention", "relevance", "operator"), _OPERATORS),
            measure=speed_against_best,
        ),
        *(
            Target(
                what=f"step in {dtype}, ViT-B/16, 5 images, speed against the published program"
                f"{remark}",
                at_least=limit,
                rows=_steps(dtype),
                measure=speed_against(f"{PUBLISHED}float32"),
            )
            for dtype, limit, remark in (
                ("float32", 2.2, ""),
                ("bfloat16", 4.0, " in float32, which is what it runs in on a CPU"),
            )
        ),
        Target(
            what="whole run, 5-way 5-shot, ViT-Ti/16 in float32, speed against the published "
            "program",
            at_least=3.0,
            rows=_whole_runs(192, 5, "float32"),
            measure=speed_against(f"{PUBLISHED}float32"),
        ),
        *_ON_ANY_DEVICE,
    ),
}
