"""Arms compared with one of them: tables for page and terminal, and what they say in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tir_kernels.analysis.page.tables import Cell, PValue, Table, Value
from tir_kernels.fewshot.methods.families import legend
from tir_kernels.fewshot.run.ablation import SINK_MEASURES, Ablation, Comparison, References
from tir_kernels.fewshot.run.summary import Estimate

NOT_APPLICABLE = "–"
LEGEND = (
    "Mean ± 95 % interval of Student's t over episodes; differences are over the episodes that "
    "both arms have. p: paired t test, with Holm's correction over the arms of a table. Episodes "
    "needed: to separate a difference of this size and spread with power 0.8, whatever the other "
    "arms do."
)


class Unit(NamedTuple):
    """How the numbers of a comparison are shown.

    Attributes:
        value: Heading of the arms' own numbers.
        difference: Unit behind a difference.
        scale, digits: As of ``Value``; ``None``: as many digits as count.
        is_signed: Whether the arms' own numbers are differences.
    """

    value: str
    difference: str
    scale: float
    digits: int | None
    is_signed: bool

    def of(self, estimate: Estimate, *, is_signed: bool) -> Value:
        """An estimate as it is shown."""
        digits = digits_of(estimate) if self.digits is None else self.digits
        return Value(estimate, self.scale, digits, is_signed)


ACCURACY = Unit("accuracy, %", "points", 100.0, 1, False)
CHANGE = Unit("change", "", 1.0, None, True)


def comparison_tables(ablation: Ablation) -> list[Table]:
    """The table of accuracies, and one for each quantity of sinks with how the arms change it."""
    return [accuracy_comparison(ablation), *sink_comparisons(ablation)]


def accuracy_comparison(ablation: Ablation) -> Table:
    """Each arm's accuracy beside the baseline's and the linear probe's."""
    table = _table("Arms compared", ablation.accuracy, ablation, ACCURACY)
    return table._replace(
        notes=(*table.notes, LEGEND, legend(own.label for own in ablation.arms.values()))
    )


def sink_comparisons(ablation: Ablation) -> list[Table]:
    """Each arm's change of a quantity of sinks from the first step to the last."""
    return [
        _table(f"{own.name}: last step minus first", own.arms, ablation, CHANGE)
        for own in ablation.changes
        if own.measure in SINK_MEASURES
    ]


def _table(title: str, arms: Sequence[Comparison], ablation: Ablation, unit: Unit) -> Table:
    baseline, probe = ablation.references.baseline, ablation.references.probe
    has_probe = probe != baseline and any(own.beyond_probe is not None for own in arms)
    behind = f", {unit.difference}" if unit.difference else ""
    columns = ["arm", "label", "episodes", unit.value]
    columns += [f"minus {baseline}{behind}", "pairs", "p (Holm)", "episodes needed"]
    columns += [f"minus {probe}{behind}"] if has_probe else []
    rows: list[tuple[Cell, ...]] = []
    for own in arms:
        value = unit.of(own.value, is_signed=unit.is_signed)
        beyond = [_signed(own.beyond_probe, unit)] if has_probe else []
        shown = ablation.arms[own.arm]
        names = shown.name, shown.label
        rows.append((*names, own.value.episodes, value, *_difference(own, unit), *beyond))
    note = separation(arms, ablation.references, unit)
    return Table(title, tuple(columns), tuple(rows), (note,) if note else ())


def _difference(own: Comparison, unit: Unit) -> list[Cell]:
    if own.difference is None:
        return [NOT_APPLICABLE] * 4
    corrected = NOT_APPLICABLE if own.holm is None else PValue(own.holm)
    needed: Cell = NOT_APPLICABLE if own.episodes_needed is None else own.episodes_needed
    return [_signed(own.difference, unit), own.difference.episodes, corrected, needed]


def _signed(estimate: Estimate | None, unit: Unit) -> Cell:
    return NOT_APPLICABLE if estimate is None else unit.of(estimate, is_signed=True)


def separation(arms: Sequence[Comparison], references: References, unit: Unit) -> str:
    """Which arms differ from the baseline, or how many episodes it would take; may be empty.

    Arms of frozen towers are spoken of only where there are no others.
    """
    compared = [own for own in arms if own.difference is not None]
    tuned = [own for own in compared if own.arm not in references.frozen]
    kind = "tuned arm" if 0 < len(tuned) < len(compared) else "arm"
    chosen = tuned or compared
    if not chosen:
        return ""
    baseline = references.baseline
    apart = [own for own in chosen if own.is_separated]
    if apart:
        rest = len(chosen) - len(apart)
        others = "" if not rest else "; the other is not" if rest == 1 else "; the others are not"
        shown = ", ".join(_found(own, unit) for own in apart)
        return f"Separated from {baseline}: {shown}{others}."
    subject = f"{chosen[0].arm} is not" if len(chosen) == 1 else f"No {kind} is"
    text = f"{subject} separated from {baseline}"
    if all(own.p is None for own in chosen):
        return f"{text}, since none shares two episodes with it."
    needed = {own.episodes_needed: own for own in reversed(chosen) if own.episodes_needed}
    if not needed:
        return f"{text}: the differences are 0 or next to it, which no number of episodes mends."
    least = min(needed)
    return (
        f"{text}; with differences as they are, it would take at least {least} episodes: for "
        f"{_found(needed[least], unit)}."
    )


def _found(own: Comparison, unit: Unit) -> str:
    behind = f" {unit.difference}" if unit.difference else ""
    p = "" if own.holm is None else f", p {PValue(own.holm).relation}"
    over = "" if own.difference is None else f" over {own.difference.episodes} pairs"
    return f"{own.arm} ({_signed(own.difference, unit)}{behind}{over}{p})"


def digits_of(estimate: Estimate) -> int:
    """Digits behind the point with which three of the larger of mean and interval are shown."""
    sizes = [abs(x) for x in (estimate.mean, estimate.half_width) if x]
    return max(0, min(6, 2 - math.floor(math.log10(max(sizes))))) if sizes else 3
