"""The findings of a run: means with confidence intervals, and paired differences of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tir_kernels.fewshot.methods.families import legend
from tir_kernels.fewshot.run.records import OK, Record, skipped_images
from tir_kernels.fewshot.run.shown_arms import ShownArm, usual_baseline
from tir_kernels.text import Notice, printable, setting

_MOST_PAIRS = 15  # of six arms; of more arms, only differences to one of them are printed


@dataclass(frozen=True)
class Estimate:
    """A mean over episodes.

    Args:
        episodes: Number of episodes.
        mean: ``None`` without episodes.
        half_width: Of the 95 % confidence interval (Student t over episodes); ``None`` for fewer
            than two episodes.
    """

    episodes: int
    mean: float | None
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value per episode."""
        count = len(values)
        if count == 0:
            return cls(0, None, None)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(1, mean, None)
        from scipy.special import stdtrit  # here, because a run's start must not wait for SciPy

        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        quantile = float(stdtrit(count - 1, 0.975))
        return cls(count, mean, quantile * math.sqrt(variance / count))


@dataclass(frozen=True)
class ArmSummary:
    """One arm: its accuracy, its speed, and the episodes that gave no result.

    Args:
        arm: Name in the journal.
        name: Name for readers.
        label: Letter of its method's family, see ``families``.
    """

    arm: str
    name: str
    label: str
    accuracy: Estimate
    seconds_per_step: float | None
    failed: dict[int, str]


@dataclass(frozen=True)
class Difference:
    """Accuracy of ``first`` minus that of ``second`` over the episodes where both have a result."""

    first: str
    second: str
    accuracy: Estimate

    @property
    def turned(self) -> Difference:
        """The same the other way round."""
        own = self.accuracy
        mean = None if own.mean is None else -own.mean
        return Difference(self.second, self.first, Estimate(own.episodes, mean, own.half_width))


@dataclass(frozen=True)
class Summary:
    """A run's outcome.

    Args:
        arms: Each arm.
        baseline: The arm that others are usually compared with.
        differences: Of each pair of arms.
        skipped_images: Unreadable images that others replaced.
    """

    arms: tuple[ArmSummary, ...]
    baseline: str
    differences: tuple[Difference, ...]
    skipped_images: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self)

    @property
    def to_baseline(self) -> tuple[Difference, ...]:
        """Each other arm minus the baseline."""
        return tuple(
            pair if pair.second == self.baseline else pair.turned
            for pair in self.differences
            if self.baseline in (pair.first, pair.second)
        )

    @property
    def failures(self) -> str:
        """The episodes without a result in words; empty if there are none."""
        return "; ".join(
            f"{entry.arm}: {status} in {_episodes(entry.failed, status)}"
            for entry in self.arms
            for status in sorted(set(entry.failed.values()))
        )


def summarise(records: Sequence[Record], arms: Mapping[str, ShownArm]) -> Summary:
    """Summarise a run.

    Args:
        records: Its journal.
        arms: How readers see the arms, by their names, in the order they are shown; the first of a
            pair is the minuend.
    """
    accuracies = {arm: accuracy_by_episode(records, arm) for arm in arms}
    differences = [
        Difference(first, second, paired(accuracies[first], accuracies[second]))
        for first, second in combinations(arms, 2)
    ]
    return Summary(
        arms=tuple(_arm(records, shown, accuracies[arm]) for arm, shown in arms.items()),
        baseline=usual_baseline(arms),
        differences=tuple(differences),
        skipped_images=tuple(skipped_images(records)),
    )


def accuracy_by_episode(records: Sequence[Record], arm: str) -> dict[int, float]:
    """Episode -> accuracy of an arm, where it has a result."""
    return {
        record.episode: record.accuracy
        for record in records
        if record.arm == arm and record.status == OK and record.accuracy is not None
    }


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """The difference, first minus second, over the episodes that both have.

    Args:
        first, second: Episode -> value.
    """
    common = sorted(first.keys() & second.keys())
    return Estimate.of([first[episode] - second[episode] for episode in common])


def _arm(records: Sequence[Record], shown: ShownArm, accuracies: dict[int, float]) -> ArmSummary:
    own = [record for record in records if record.arm == shown.arm]
    times = [record.seconds_per_step for record in own if record.seconds_per_step is not None]
    return ArmSummary(
        arm=shown.arm,
        name=shown.name,
        label=shown.label,
        accuracy=Estimate.of([accuracies[episode] for episode in sorted(accuracies)]),
        seconds_per_step=math.fsum(times) / len(times) if times else None,
        failed={record.episode: record.status for record in own if record.status != OK},
    )


def _episodes(failed: dict[int, str], status: str, limit: int = 8) -> str:
    numbers = [str(episode) for episode in sorted(failed) if failed[episode] == status]
    plural = "s" if len(numbers) > 1 else ""
    rest = f" and {len(numbers) - limit} more" if len(numbers) > limit else ""
    return f"episode{plural} {', '.join(numbers[:limit])}{rest}"


def print_summary(
    summary: Summary, console: Console, spelled: Callable[[Notice], str] = str
) -> None:
    """Print the tables, and what the reader must know to read them.

    Args:
        summary: The findings.
        console: Console to print to.
        spelled: Gives a line's text, with settings named as the reader knows them.
    """

    def say(text: str) -> None:
        # Names come from files, and brackets in them are no markup.
        console.print(spelled(Notice(text)), markup=False, emoji=False, highlight=False)

    table = Table(title="Accuracy, mean ± 95 % confidence interval over episodes")
    table.add_column("arm")
    table.add_column("label")
    for heading in ("episodes", "accuracy %", "seconds per step"):
        table.add_column(heading, justify="right")
    for entry in summary.arms:
        speed = "-" if entry.seconds_per_step is None else f"{entry.seconds_per_step:.3g}"
        accuracy = _percent(entry.accuracy, "")
        episodes = str(entry.accuracy.episodes)
        table.add_row(_cell(entry.name), entry.label, episodes, accuracy, speed)
    console.print(table)
    if summary.differences:
        pairs, what = summary.differences, ""
        if len(pairs) > _MOST_PAIRS:
            pairs, what = summary.to_baseline, f" to {printable(summary.baseline)}"
        title = f"Paired difference{what}, mean ± 95 % confidence interval over episodes"
        table = Table(title=Text(title))
        table.add_column("arms")
        for heading in ("episodes", "difference, points"):
            table.add_column(heading, justify="right")
        labels = {entry.arm: entry.label for entry in summary.arms}
        for pair in pairs:
            names = " − ".join(f"{arm} ({labels[arm]})" for arm in (pair.first, pair.second))
            table.add_row(_cell(names), str(pair.accuracy.episodes), _percent(pair.accuracy, "+"))
        console.print(table)
        if what:
            say("The differences of all pairs are in summary.json, in the folder of the run.")
    say(legend(entry.label for entry in summary.arms))
    if any(entry.accuracy.episodes == 1 for entry in summary.arms):
        say(f"One episode gives no interval; raise {setting('episodes')} for one.")
    if summary.skipped_images:
        say(f"Unreadable images that were skipped: {', '.join(summary.skipped_images)}")


def _cell(text: str) -> Text:
    return Text(printable(text))


def _percent(estimate: Estimate, sign: str) -> str:
    if estimate.mean is None:
        return "no result"
    mean = f"{100 * estimate.mean:{sign}.2f}"
    if estimate.half_width is None:
        return f"{mean} (no interval)"
    return f"{mean} ± {100 * estimate.half_width:.2f}"
