"""Runs as a report needs them, read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tir_kernels.analysis.page.curves import Quantity, quantities
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.methods.families import legend
from tir_kernels.fewshot.run.ablation import (
    ZERO_SHOT,
    Ablation,
    ablation_of,
)
from tir_kernels.fewshot.run.folder import expanded_out, read_journals, read_settings
from tir_kernels.fewshot.run.maps import RunMaps
from tir_kernels.fewshot.run.records import Record
from tir_kernels.fewshot.run.shown_arms import ShownArm, shown_arms, usual_baseline
from tir_kernels.fewshot.run.summary import (
    Estimate,
    Summary,
    accuracy_by_episode,
    summarise,
)
from tir_kernels.fewshot.run.tracked import tracks_of
from tir_kernels.text import setting


@dataclass(frozen=True)
class ReportedRun:
    """A run and all that was kept of it.

    Args:
        name: Name for readers.
        settings: All that decides its numbers, as in its ``settings.json``.
        about: Facts beside them: data, model, versions.
        episodes: Number of its episodes, finished or not.
        arms: Names of its arms, in order.
        baseline: The arm that the others are compared with.
        records: Its journal.
        found: Measures through training; empty if it was not tracked.
        maps: Arrays for pictures, in their files; empty if it was not tracked.
    """

    name: str
    settings: dict[str, Any]
    about: dict[str, Any]
    episodes: int
    arms: tuple[str, ...]
    baseline: str
    records: list[Record]
    found: list[Quantity]
    maps: RunMaps

    @cached_property
    def accuracies(self) -> dict[str, dict[int, float]]:
        """Arm -> episode -> accuracy."""
        return {arm: accuracy_by_episode(self.records, arm) for arm in self.arms}

    @cached_property
    def summary(self) -> Summary:
        """The findings that the run's own table has."""
        return summarise(self.records, self.shown)

    def accuracy(self, arm: str) -> Estimate:
        """The mean accuracy of an arm."""
        return Estimate.of(list(self.accuracies[arm].values()))

    @cached_property
    def ablation(self) -> Ablation:
        """Each arm compared with the baseline, as ``ablate`` does it."""
        changes = {
            (own.measure, own.name): {arm: own.change(arm) for arm in self.arms}
            for own in self.found
        }
        return ablation_of(self.accuracies, changes, self.shown, self.baseline)

    @cached_property
    def shown(self) -> dict[str, ShownArm]:
        """Arm -> how readers see it."""
        return shown_arms(self.settings, self.arms)

    @property
    def legend(self) -> str:
        """The meaning of the arms' labels."""
        return legend(own.label for own in self.shown.values())

    @property
    def is_uneven(self) -> bool:
        """Whether an arm has episodes that another has not, as in a run that was stopped."""
        return len({frozenset(own) for own in self.accuracies.values()}) > 1

    @property
    def zero_shot(self) -> str | None:
        """The arm without training, if there is one."""
        return next((arm for arm, own in self.shown.items() if own.method == ZERO_SHOT), None)

    @property
    def data(self) -> str:
        """A short name of the data: the last part of a path, or of a data set's name."""
        full = str(self.about.get("data", "")).rstrip("/")
        return full.rsplit("/", 1)[-1] or self.name

    @property
    def shots(self) -> int | None:
        """Labelled images per class."""
        return self.settings.get("shots")


def load_runs(folders: Sequence[str | Path], baseline: str | None = None) -> list[ReportedRun]:
    """Read runs for a report.

    Args:
        folders: Folders of runs, finished or not.
        baseline: The arm that others are compared with, in runs that have it; by default the first
            of LoRA's arms, else of the linear probe's, else the first of all.

    Raises:
        FewShotError: A folder holds no run, can't be read or is damaged; or no run has such an arm.
    """
    paths = [expanded_out(folder) for folder in folders]
    runs = [_load(path, baseline) for path in paths]
    if baseline is not None and all(baseline not in run.arms for run in runs):
        known = ", ".join(dict.fromkeys(arm for run in runs for arm in run.arms))
        raise FewShotError(f"{setting('baseline')} must be one of {known}; got {baseline!r}")
    return runs


def _load(path: Path, baseline: str | None) -> ReportedRun:
    content = read_settings(path)
    settings = content["settings"]
    records, journals = read_journals(path)
    # Runs from before there were arms name methods; without either, the records tell.
    named = settings.get("arms", settings.get("method")) or [record.arm for record in records]
    arms = tuple(dict.fromkeys(named))
    if not arms:
        raise FewShotError(f"{path} holds a run without arms and without results")
    if baseline is None or baseline not in arms:
        baseline = usual_baseline(shown_arms(settings, arms))
    about = content.get("about")
    place = path.resolve()
    if place.name.startswith("."):  # what a fit keeps, in the folder of its classifier
        place = place.parent
    return ReportedRun(
        name=place.name or str(path),
        settings=settings,
        about=about if isinstance(about, dict) else {},
        episodes=content["episodes"],
        arms=arms,
        baseline=baseline,
        records=records,
        found=quantities(tracks_of(records, journals)),
        maps=RunMaps(path, records),
    )
