"""The targets that the kernels and the few-shot engine are meant to reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .counting import fused_memory
from .memory_probe import MIB
from .peers.attention import FLEX, MASKED, UNWEIGHTED
from .peers.common import COMPILED, EAGER
from .peers.operator import COMPILED_SDPA
from .records import Record
from .settings import DTYPES, OURS, PUBLISHED
from .shapes import PREFIX_TOKENS
from .suites.episodes import START_UP, WHOLE_RUN
from .suites.operator import HOST_TIME
from .suites.step import STEP

Case = dict[str, Record]  # implementation -> record, of one case
# Ours, and the case it belongs to -> the number a target limits; None where a peer is missing.
Measure = Callable[[Record, Case], "float | None"]


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


def _step_of_vit_b(dtype: str) -> Callable[[Record], bool]:
    """Whether a record is of a step with five images, one episode at a time."""
    sizes = {"B": 5, "L": 197, "D": 768}

    def applies(record: Record) -> bool:
        return (
            record["suite"] == "step"
            and record["operator"] == f"{STEP}, placement tokens"
            and record["dtype"] == dtype
            and all(record["shape"][name] == size for name, size in sizes.items())
        )

    return applies


def _whole_run(width: int, shots: int) -> Callable[[Record], bool]:
    """Five-way episodes, at the method's settings, of a transformer with 197 tokens of a width."""
    sizes = {"ways": 5, "shots": shots, "queries": 15, "steps": 100, "L": 197, "D": width}

    def applies(record: Record) -> bool:
        return (
            record["suite"] == "episodes"
            and record["operator"].startswith(WHOLE_RUN)
            and all(record["shape"][name] == size for name, size in sizes.items())
        )

    return applies


def _cpu_whole_run(record: Record) -> bool:
    return _whole_run(192, 5)(record) and record["dtype"] == "float32"


def _start_up(record: Record) -> bool:
    return record["suite"] == "episodes" and record["operator"].startswith(START_UP)


def _step_memory(record: Record) -> bool:
    return record["suite"] == "memory" and record["operator"] == STEP


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
_OF_VIT_B = "ViT-B/16, 5 images, speed against the published program"
_OF_A_RUN = "whole run, 5-way"

_OF_EPISODES = (
    Target(
        "fine-tuning step, peak memory against the published program",
        0.5,
        True,
        _step_memory,
        _share_of_published_memory,
    ),
    Target("start-up to the first step, files in cache", 10.0, True, _start_up, _seconds, unit="s"),
)

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
        Target(
            f"{_OF_A_RUN} 5-shot, ViT-B/16, speed against the published program",
            10.0,
            False,
            _whole_run(768, 5),
            speed_against(PUBLISHED),
        ),
        Target(
            f"{_OF_A_RUN} 1-shot, ViT-B/16, speed against the published program",
            20.0,
            False,
            _whole_run(768, 1),
            speed_against(PUBLISHED),
        ),
        Target(
            f"{_OF_A_RUN} 5-shot, ViT-B/16, model FLOPs over the rate of a large product",
            0.4,
            False,
            _whole_run(768, 5),
            _fraction,
            unit="%",
        ),
        *_OF_EPISODES,
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
        Target(
            f"step in float32, {_OF_VIT_B}",
            2.2,
            False,
            _step_of_vit_b("float32"),
            speed_against(f"{PUBLISHED}float32"),
        ),
        Target(
            f"step in bfloat16, {_OF_VIT_B} in float32, which is what it runs in on a CPU",
            4.0,
            False,
            _step_of_vit_b("bfloat16"),
            speed_against(f"{PUBLISHED}float32"),
        ),
        Target(
            f"{_OF_A_RUN} 5-shot, ViT-Ti/16 in float32, speed against the published program",
            3.0,
            False,
            _cpu_whole_run,
            speed_against(f"{PUBLISHED}float32"),
        ),
        *_OF_EPISODES,
    ),
}
