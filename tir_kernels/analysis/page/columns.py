"""Columns of a table over data sets: runs of the same episodes are one, so that arms meet in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from tir_kernels.analysis.page.runs import ReportedRun
from tir_kernels.fewshot.run.shown_arms import ShownArm
from tir_kernels.fewshot.run.summary import Estimate, paired

# Settings that leave the episodes alone, and that arms are not held against each other by.
_BESIDE_THE_TASK = {"arms", "method", "track", "device", "backend"}


class Row(NamedTuple):
    """An arm over several data sets; one that has other shown options elsewhere is another row.

    Attributes:
        arm: Its name in the journals.
        method: Name of its method.
        name: Name for readers.
        label: Letter of its method's family.
    """

    arm: str
    method: str
    name: str
    label: str

    @classmethod
    def of(cls, shown: ShownArm) -> Row:
        """The row of an arm."""
        return cls(shown.arm, shown.method, shown.name, shown.label)


@dataclass(frozen=True)
class Column:
    """A data set with a number of shots: what one run found, or several on the same episodes.

    Args:
        name: Heading.
        runs: The runs.
    """

    name: str
    runs: tuple[ReportedRun, ...]

    @cached_property
    def accuracies(self) -> dict[Row, dict[int, float]]:
        """Row -> episode -> accuracy; of an arm in two runs, that of the run with more episodes."""
        found: dict[Row, dict[int, float]] = {}
        for run in self.runs:
            for arm, own in run.accuracies.items():
                row = Row.of(run.shown[arm])
                if row not in found or len(own) > len(found[row]):
                    found[row] = own
        return found

    @cached_property
    def changed(self) -> dict[Row, tuple[str, ...]]:
        """Row -> its options that differ from its method's own and are not in its name."""
        return {Row.of(shown): shown.changed for run in self.runs for shown in run.shown.values()}

    @cached_property
    def episodes(self) -> frozenset[int]:
        """The episodes that any arm has."""
        return frozenset(episode for own in self.accuracies.values() for episode in own)

    @property
    def data(self) -> str:
        """A short name of the data."""
        return self.runs[0].data

    @property
    def ways(self) -> int | None:
        """Classes of an episode."""
        return self.runs[0].settings.get("ways")

    def is_whole(self, row: Row) -> bool:
        """Whether an arm has all episodes that others have."""
        return self.accuracies.get(row, {}).keys() == self.episodes != frozenset()

    def accuracy(self, row: Row) -> Estimate:
        """The mean accuracy of an arm."""
        own = self.accuracies.get(row, {})
        return Estimate.of([own[episode] for episode in sorted(own)])

    def difference(self, row: Row, baseline: str) -> Estimate:
        """An arm minus the arm of that name, over the episodes that both have."""
        other = self.row_of(baseline)
        return paired(self.accuracies.get(row, {}), self.accuracies[other] if other else {})

    def row_of(self, arm: str) -> Row | None:
        """The row of the arm of that name."""
        return next((row for row in self.accuracies if row.arm == arm), None)

    @property
    def facts(self) -> dict[str, str]:
        """What the numbers stand on, in words."""
        settings, about = self.runs[0].settings, self.runs[0].about
        words = {
            "ways": "{} ways",
            "queries": "{} queries per class",
            "augment": "{} random views beside each image",
            "precision": "{}",
            "seed": "seed {}",
        }
        told = {
            name: text.format(settings[name]) for name, text in words.items() if name in settings
        }
        if settings.get("ways") == "all":
            told["ways"] = "all classes"
        if settings.get("queries") == "all":
            told["queries"] = "all other images as queries"
        if "model" in about:
            told["model"] = str(about["model"])
        return {**told, "episodes": f"{len(self.episodes)} episodes"}


class Block(NamedTuple):
    """The columns of a number of shots.

    Attributes:
        shots: Labelled images per class; ``None`` for runs that do not tell.
        columns: One for each data set.
        baseline: Name of the arm that others are compared with.
    """

    shots: int | None
    columns: tuple[Column, ...]
    baseline: str

    @property
    def rows(self) -> list[Row]:
        """All arms, in the order that the runs have them."""
        return list(dict.fromkeys(row for column in self.columns for row in column.accuracies))

    def name_of(self, row: Row) -> str:
        """The name of a row, with the method where two rows would have the same."""
        names = [each.name for each in self.rows]
        return row.name if names.count(row.name) == 1 else f"{row.name} ({row.method})"

    @property
    def title(self) -> str:
        """The number of shots in words."""
        if self.shots is None:
            return "any number of shots"
        return f"{self.shots} shot{'s' * (self.shots != 1)} per class"


def blocks_of(runs: Sequence[ReportedRun], baseline: str | None = None) -> list[Block]:
    """Runs as columns, by the number of shots.

    Args:
        runs: The runs.
        baseline: The arm that others are compared with; ``None``: of the arms that the runs compare
            with by themselves, the one that most columns have.
    """
    groups: list[list[ReportedRun]] = []
    for run in runs:
        own = next((each for each in groups if all(is_same_task(run, other) for other in each)), [])
        if not own:
            groups.append(own)
        own.append(run)
    keys = [(own[0].data, own[0].shots) for own in groups]
    columns = [
        Column(data if keys.count((data, shots)) == 1 else f"{data} ({own[0].name})", tuple(own))
        for (data, shots), own in zip(keys, groups, strict=True)
    ]
    found = []
    for shots in sorted({own for _, own in keys}, key=lambda each: (each is None, each or 0)):
        chosen = tuple(each for each in columns if each.runs[0].shots == shots)
        found.append(Block(shots, chosen, baseline or _usual_baseline(chosen)))
    return found


def _usual_baseline(columns: Sequence[Column]) -> str:
    candidates = dict.fromkeys(run.baseline for column in columns for run in column.runs)
    return max(candidates, key=lambda arm: sum(each.row_of(arm) is not None for each in columns))


def is_same_task(first: ReportedRun, second: ReportedRun) -> bool:
    """Whether two runs drew the same episodes of the same images for the same model.

    Runs that do not tell what their images and their model were are never taken for the same, nor
    are those in which an arm of one name has unlike options.
    """
    own, other = _task(first.settings), _task(second.settings)
    if own != other or not {"data", "model"} <= own.keys():
        return False
    arms, others = first.settings.get("arms"), second.settings.get("arms")
    if not isinstance(arms, dict) or not isinstance(others, dict):
        return False
    if any(arms[arm] != others[arm] for arm in arms.keys() & others.keys()):
        return False
    drawn = {record.episode: record.classes for record in first.records}
    return all(drawn.get(each.episode, each.classes) == each.classes for each in second.records)


def _task(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _BESIDE_THE_TASK}
