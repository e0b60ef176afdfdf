"""An observer that reads measures of the image tower while a method trains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels import analysis
from tir_kernels.analysis import MEASURES, measure_class
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Learner, Observer
from tir_kernels.fewshot.run.tracked import Block, Number, Series, Track
from tir_kernels.towers import vision_tower

_Key = tuple[str, str, Block]  # measure, quantity, block


class Tracker(Observer):
    """Measures of the image tower on an episode's support images, as a training goes on.

    Labels are the images', classes the arm's own: the embeddings that its logits compare with.
    Augmented views are left out. A method that leaves the image tower alone has nothing to track.

    Args:
        model: The model that is trained.
        every: Steps from one reading to the next; the first is before the first step, the last
            after the last.
        measures: Names in ``analysis.MEASURES``; ``None``: all.

    Raises:
        ValueError: A measure that there is not, or ``every`` below 1.
    """

    def __init__(
        self, model: nn.Module, every: int = 10, measures: Iterable[str] | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1; got {every}")
        self.every = every
        self._model = model
        self._classes = [measure_class(name) for name in measures or MEASURES]
        self._readings: dict[int, _Readings] = {}

    def start(self, episodes: Sequence[Episode]) -> None:
        self._episodes = episodes
        self._measures = [_Noting(each()) for each in self._classes]
        # Labels are read from here, since nobody may wait for a device while a graph is made.
        self._labels = torch.stack([each.support_labels for each in episodes])
        self._readings |= {each.index: _Readings() for each in episodes}

    def observe(self, step: int, learner: Learner, inputs: Tensor) -> None:
        if inputs.dim() != 4:
            return
        views = self._episodes[0].views
        tokens = inputs[:, ::views]
        labels = self._labels[:, ::views].to(inputs.device)
        analysis.measure(
            vision_tower(self._model),
            tokens.flatten(0, 1),
            self._measures,
            labels=labels.flatten(),
            class_embeddings=learner.show_classes(learner.classes()),
        )
        own = [self._readings[episode.index] for episode in self._episodes]
        for readings in own:
            readings.begin(step)
        for noting in self._measures:
            for finding in noting.take():
                averages = finding.averages(len(own))
                key = (noting.name, finding.name, finding.block)
                for readings, average in zip(own, averages, strict=True):
                    readings.add(key, average.value, average.chance)

    def resume(self, track: Track) -> None:
        """Go on behind what was read of an episode's training before it was stopped."""
        readings = _Readings()
        for step in track.steps:
            readings.begin(step)
            for row in track.rows():
                if row.step == step:
                    readings.add((row.measure, row.name, row.block), row.value, row.chance)
        self._readings[track.episode] = readings

    def track(self, episode: int, arm: str = "") -> Track | None:
        """All that was read of an episode, under the name of an arm; ``None``: nothing.

        Args:
            episode: Its ``index``.
            arm: Name for the rows.
        """
        readings = self._readings.get(episode)
        return None if readings is None else readings.track(episode, arm)


class _Noting:
    """A measure whose findings are kept until they are taken."""

    def __init__(self, measure: Any) -> None:
        self.name = measure.name
        self._measure = measure
        self._found: list[Any] = []

    def of_block(self, view: Any) -> tuple[()]:
        self._found += self._measure.of_block(view)
        return ()

    def take(self) -> list[Any]:
        found, self._found = self._found, []
        return found


class _Readings:
    """The numbers of one episode."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._numbers: dict[_Key, dict[int, tuple[Number, Number]]] = {}  # value and chance

    def begin(self, step: int) -> None:
        self._steps.append(step)

    def add(self, key: _Key, value: Number, chance: Number) -> None:
        self._numbers.setdefault(key, {})[self._steps[-1]] = value, chance

    def track(self, episode: int, arm: str) -> Track | None:
        if not self._steps:
            return None
        quantities: dict[tuple[str, str], list[Block]] = {}
        for measure, name, block in self._numbers:
            quantities.setdefault((measure, name), []).append(block)
        series = []
        for (measure, name), blocks in quantities.items():
            own = [self._numbers[measure, name, block] for block in blocks]
            found = [[each.get(step, (None, None)) for each in own] for step in self._steps]
            values, chance = ([[pair[i] for pair in row] for row in found] for i in (0, 1))
            is_constant = all(levels == chance[0] for levels in chance)
            series.append(
                Series(measure, name, blocks, chance[:1] if is_constant else chance, values)
            )
        return Track(episode, arm, self._steps, series)
