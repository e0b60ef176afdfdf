"""The findings of a comparison: each arm against one of them, in accuracy and in measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tir_kernels.fewshot.methods.families import UNTUNED
from tir_kernels.fewshot.run.folder import read_journals, read_settings
from tir_kernels.fewshot.run.shown_arms import ShownArm, shown_arms
from tir_kernels.fewshot.run.statistics import SIGNIFICANCE, episodes_needed, holm, p_value
from tir_kernels.fewshot.run.summary import Estimate, accuracy_by_episode, paired
from tir_kernels.fewshot.run.tracked import Series, tracks_of

# Measures of sinks, which tables show; ``changes`` has all.
SINK_MEASURES = ("sink-ratio", "received-mass", "top-patch", "norm-outliers")

ZERO_SHOT, LINEAR_PROBE = "zero-shot", "linear-probe"  # methods that others are held against

ByEpisode = Mapping[str, Mapping[int, float]]  # arm -> episode -> value


@dataclass(frozen=True)
class Comparison:
    """One arm, beside the one that all are compared with.

    Args:
        arm: Name of the arm.
        value: Mean over its episodes.
        difference: To the other arm over the episodes that both have; ``None`` for that arm itself.
        p: Of a paired t test that there is no difference.
        holm: The same, corrected for the number of arms compared.
        episodes_needed: For a difference of this size to be separated whatever the other arms do,
            at power 0.8 and significance 0.05 over the number of arms compared.
        beyond_probe: Difference to the linear probe on the frozen tower over the episodes that
            both have; ``None`` without a probe, and for the arms of frozen towers.
    """

    arm: str
    value: Estimate
    difference: Estimate | None
    p: float | None
    holm: float | None
    episodes_needed: int | None
    beyond_probe: Estimate | None

    @property
    def is_separated(self) -> bool:
        """Whether the corrected test finds a difference."""
        return self.holm is not None and self.holm < SIGNIFICANCE


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
class References:
    """The arms that others are held against.

    Args:
        baseline: The arm that all are compared with.
        probe: The linear probe on the frozen tower, if there is one.
        frozen: All arms whose tower is not tuned.
    """

    baseline: str
    probe: str | None = None
    frozen: tuple[str, ...] = ()

    @classmethod
    def among(cls, arms: Mapping[str, ShownArm], baseline: str) -> References:
        """The references among a run's arms.

        Args:
            arms: How readers see the arms, by their names.
            baseline: The arm that all are compared with.
        """
        probes = [arm for arm, own in arms.items() if own.method == LINEAR_PROBE]
        frozen = tuple(arm for arm, own in arms.items() if own.label in UNTUNED)
        return cls(baseline, probes[0] if probes else None, frozen)


@dataclass(frozen=True)
class Ablation:
    """All comparisons of a run.

    Args:
        references: The arms that others are held against.
        arms: How readers see the arms, by their names.
        accuracy: Each arm's accuracy, in [0, 1].
        changes: What was tracked.
    """

    references: References
    arms: Mapping[str, ShownArm]
    accuracy: tuple[Comparison, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """The ablation as JSON values."""
        content = asdict(self)
        return {**content.pop("references"), **content}


def read_ablation(folder: str | Path, arms: Sequence[str], baseline: str) -> Ablation:
    """Compare the arms of a run with one of them.

    Args:
        folder: The run's folder.
        arms: Its arms in the order they are shown.
        baseline: The arm that all are compared with.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    records, journals = read_journals(folder)
    accuracies = {arm: accuracy_by_episode(records, arm) for arm in arms}
    changes: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for track in tracks_of(records, journals):
        for series in track.series:
            change = last_minus_first(series)
            if change is not None:
                own = changes.setdefault((series.measure, series.name), {})
                own.setdefault(track.arm, {})[track.episode] = change
    shown = shown_arms(read_settings(folder)["settings"], arms)
    return ablation_of(accuracies, changes, shown, baseline)


def ablation_of(
    accuracies: ByEpisode,
    changes: Mapping[tuple[str, str], ByEpisode],
    arms: Mapping[str, ShownArm],
    baseline: str,
) -> Ablation:
    """All comparisons of arms with one of them.

    Args:
        accuracies: Arm -> episode -> accuracy, in the order that arms are shown.
        changes: (measure, quantity) -> arm -> episode -> ``last_minus_first``; what no arm of
            ``accuracies`` has is left out.
        arms: How readers see the arms, by their names.
        baseline: The arm that all are compared with.
    """
    references = References.among(arms, baseline)
    own = {
        key: {arm: values[arm] for arm in accuracies if values.get(arm)}
        for key, values in changes.items()
    }
    return Ablation(
        references=references,
        arms=arms,
        accuracy=compare(accuracies, references),
        changes=tuple(
            Change(*key, compare(values, references)) for key, values in own.items() if values
        ),
    )


def compare(values: ByEpisode, references: References) -> tuple[Comparison, ...]:
    """Compare arms with one of them, each pair over the episodes that both have.

    Args:
        values: Arm -> episode -> value.
        references: The arms that others are held against; without values of the baseline there are
            no differences.
    """
    other = values.get(references.baseline, {})
    probe = values.get(references.probe, {}) if references.probe is not None else {}
    differences = {
        arm: paired(own, other) if other and arm != references.baseline else None
        for arm, own in values.items()
    }
    tests = [None if each is None else p_value(each) for each in differences.values()]
    level = SIGNIFICANCE / max(1, sum(p is not None for p in tests))
    found = []
    for (arm, own), p, corrected in zip(values.items(), tests, holm(tests), strict=True):
        difference = differences[arm]
        needed = None if difference is None else episodes_needed(difference, significance=level)
        is_tuned = arm not in references.frozen
        beyond = paired(own, probe) if probe and is_tuned else None
        mean = Estimate.of([own[episode] for episode in sorted(own)])
        found.append(Comparison(arm, mean, difference, p, corrected, needed, beyond))
    return tuple(found)


def last_minus_first(series: Series) -> float | None:
    """The change from the first reading to the last, as a mean over the blocks that have both."""
    if len(series.values) < 2:
        return None
    pairs = zip(series.values[0], series.values[-1], strict=True)
    changes = [last - first for first, last in pairs if first is not None and last is not None]
    return fmean(changes) if changes else None
