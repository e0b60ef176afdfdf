"""Tracking of a whole run: the observers of each training, and what they saw on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Observer
from tir_kernels.fewshot.run.maps import write_maps
from tir_kernels.fewshot.run.records import OK, Record
from tir_kernels.fewshot.run.tracked import TrackFile
from tir_kernels.fewshot.settings import Arm
from tir_kernels.fewshot.track.pictures import MapMaker
from tir_kernels.fewshot.track.settings import Tracking
from tir_kernels.fewshot.track.tracker import Tracker
from tir_kernels.towers.loading.loaded import LoadedModel


class RunWatcher:
    """Watches the trainings of a run; see ``run.runner.Watcher``.

    Args:
        tracking: What is read.
        model: The model.
        arms: Names of the run's arms.
        journal: Path of the journal of this process.
    """

    def __init__(
        self, tracking: Tracking, model: LoadedModel, arms: Sequence[str], journal: Path
    ) -> None:
        self._tracking, self._model, self._arms = tracking, model, arms
        self._folder = journal.parent
        self._file = TrackFile(journal)
        self._episodes: dict[int, Episode] = {}
        self._tracker: Tracker | None = None
        self._maker: MapMaker | None = None

    def observers(self, arm: Arm, episodes: Sequence[Episode]) -> Sequence[Observer]:
        """Observers of the next training."""
        model = self._model.model
        self._episodes = {each.index: each for each in episodes}
        self._tracker = Tracker(model, self._tracking.every, self._tracking.measures)
        self._maker = None
        if all(each.index >= self._tracking.maps for each in episodes):
            return [self._tracker]
        self._maker = MapMaker(model, arm.method, self._model.preprocess.to_image)
        return [self._tracker, self._maker]

    def keep(self, record: Record) -> None:
        """Have what was seen of a finished training on the disk, before its record is there.

        Raises:
            FewShotError: It can't be written.
        """
        if self._tracker is not None:
            track = self._tracker.track(record.episode, record.arm)
            if track is not None:
                self._file.append(track)
        is_pictured = record.status == OK and record.episode < self._tracking.maps
        if self._maker is not None and is_pictured:
            maps = self._maker.maps(self._episodes[record.episode], record.arm)
            if maps is not None:
                write_maps(self._folder, self._arms.index(record.arm), maps)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
