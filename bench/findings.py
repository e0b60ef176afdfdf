"""The distance of the records from the targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .records import Record, case_key
from .settings import OURS, READABLE
from .tables import Section, shape_text
from .targets import TARGETS, Case, Target

_SHOWN_SHAPES = 4


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
    """A finding per target and backend that was measured, or the target itself if none was."""
    cases: dict[tuple, Case] = {}
    for record in records:
        if record["device"] == device:
            cases.setdefault(case_key(record), {})[record["implementation"]] = record
    result: list[Finding | Target] = []
    for target in TARGETS[device]:
        values: dict[str, list[tuple[float, Record]]] = {}
        for case in cases.values():
            for name, record in case.items():
                if name.startswith(OURS) and name != READABLE and target.concerns(record):
                    value = target.measure.of(record, case)
                    if value is not None:
                        values.setdefault(name, []).append((value, record))
        for name, found in values.items():
            worst_first = sorted(found, key=lambda pair: pair[0], reverse=target.measure.is_upper)
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
    return f"{'≤' if target.measure.is_upper else '≥'} {_value(target.limit, target)}"


def _value(value: float, target: Target) -> str:
    unit = target.measure.unit
    if unit == "%":
        return f"{100 * value:.0f} %"
    return f"{value:.2f}×" if unit == "×" else f"{value:.1f} {unit}"


def _where(record: Record) -> str:
    return f"{record['operator']} {record['direction']} {record['dtype']} {shape_text(record)}"
