"""The findings of an ablation: each arm against one of them, in accuracy and in measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tir_kernels.fewshot.run.folder import read_run
from tir_kernels.fewshot.run.records import OK
from tir_kernels.fewshot.run.statistics import episodes_needed, holm, p_value
from tir_kernels.fewshot.run.summary import Estimate
from tir_kernels.fewshot.run.tracked import Series, read_tracks

# Measures of sinks, which the table shows; ``changes`` has all.
SINK_MEASURES = ("sink-ratio", "received-mass", "top-patch", "norm-outliers")


@dataclass(frozen=True)
class Comparison:
    """One arm, beside the one that all are compared with.

    Args:
        arm: Name of the arm.
        value: Mean over its episodes.
        difference: To the other arm over the episodes that both have; ``None`` for that arm itself.
        p: Of a paired t test that there is no difference.
        holm: The same, corrected for the number of arms compared.
        episodes_needed: For a difference of this size, at power 0.8 and significance 0.05.
    """

    arm: str
    value: Estimate
    difference: Estimate | None
    p: float | None
    holm: float | None
    episodes_needed: int | None


@dataclass(frozen=True)
class Change:
    """A quantity's change from the first reading to the last, as a mean over blocks, per arm.

    Args:
        measure, name: As of ``Tracked``.
        arms: The arms that were tracked.
    """

    measure: str
    name: str
    arms: tuple[Comparison, ...]


@dataclass(frozen=True)
class Ablation:
    """All comparisons of a run.

    Args:
        baseline: The arm that all are compared with.
        accuracy: Each arm's accuracy, in [0, 1].
        changes: What was tracked.
    """

    baseline: str
    accuracy: tuple[Comparison, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """The ablation as JSON values."""
        return asdict(self)


def read_ablation(folder: str | Path, arms: Sequence[str], baseline: str) -> Ablation:
    """Compare the arms of a run with one of them.

    Args:
        folder: The run's folder.
        arms: Its arms in the order they are shown.
        baseline: The arm that all are compared with.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    accuracies: dict[str, dict[int, float]] = {arm: {} for arm in arms}
    for record in read_run(folder):
        if record.status == OK and record.accuracy is not None and record.arm in accuracies:
            accuracies[record.arm][record.episode] = record.accuracy
    changes: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for track in read_tracks(folder):
        for series in track.series:
            change = _change(series)
            if track.arm in accuracies and change is not None:
                own = changes.setdefault((series.measure, series.name), {})
                own.setdefault(track.arm, {})[track.episode] = change
    return Ablation(
        baseline=baseline,
        accuracy=compare(accuracies, baseline),
        changes=tuple(
            Change(measure, name, compare({arm: own[arm] for arm in arms if arm in own}, baseline))
            for (measure, name), own in changes.items()
        ),
    )


def compare(values: dict[str, dict[int, float]], baseline: str) -> tuple[Comparison, ...]:
    """Compare arms with one of them.

    Args:
        values: Arm -> episode -> value.
        baseline: The arm that the others are compared with; without it there are no differences.
    """
    other = values.get(baseline, {})
    found = []
    for arm, own in values.items():
        difference = None
        if arm != baseline and other:
            common = sorted(own.keys() & other.keys())
            difference = Estimate.of([own[episode] - other[episode] for episode in common])
        estimate = Estimate.of([own[episode] for episode in sorted(own)])
        found.append((arm, estimate, difference))
    tests = [None if each is None else p_value(each) for _, _, each in found]
    needed = [None if each is None else episodes_needed(each) for _, _, each in found]
    return tuple(
        Comparison(*own, p, corrected, number)
        for own, p, corrected, number in zip(found, tests, holm(tests), needed, strict=True)
    )


def _change(series: Series) -> float | None:
    """Last minus first reading, over the blocks that have both."""
    if len(series.values) < 2:
        return None
    pairs = zip(series.values[0], series.values[-1], strict=True)
    changes = [last - first for first, last in pairs if first is not None and last is not None]
    return fmean(changes) if changes else None


def accuracy_rows(ablation: Ablation) -> list[list[str]]:
    """The table of accuracies: a heading and a row an arm, in percent and points."""
    heading = ["arm", "episodes", "accuracy %", f"− {ablation.baseline}, points", "p (Holm)"]
    rows = [[*heading, "episodes needed"]]
    for own in ablation.accuracy:
        row = [own.arm, str(own.value.episodes), shown(own.value, 100, "", 2)]
        rows.append([*row, *_difference(own, 100, 2)])
    return rows


def change_rows(
    ablation: Ablation, measures: Sequence[str] | None = SINK_MEASURES
) -> list[list[str]]:
    """The table of changes from the first step to the last: a heading and a row an arm each.

    Args:
        ablation: The ablation.
        measures: Measures to show; ``None``: all.
    """
    heading = ["quantity", "arm", "episodes", "change", f"− {ablation.baseline}", "p (Holm)"]
    rows = [[*heading, "episodes needed"]]
    for change in ablation.changes:
        if measures is not None and change.measure not in measures:
            continue
        for own in change.arms:
            row = [change.name, own.arm, str(own.value.episodes), shown(own.value, 1, "+", 4)]
            rows.append([*row, *_difference(own, 1, 4)])
    return rows


def shown(estimate: Estimate, factor: float, sign: str, digits: int) -> str:
    """An estimate times a factor, with its 95 % interval where there is one."""
    if estimate.mean is None:
        return "-"
    mean = f"{factor * estimate.mean:{sign}.{digits}f}"
    if estimate.half_width is None:
        return mean
    return f"{mean} ± {factor * estimate.half_width:.{digits}f}"


def _difference(own: Comparison, factor: float, digits: int) -> list[str]:
    if own.difference is None:
        return ["", "", ""]
    corrected = "-" if own.holm is None else f"{own.holm:.3f}"
    needed = "-" if own.episodes_needed is None else str(own.episodes_needed)
    return [shown(own.difference, factor, "+", digits), corrected, needed]
