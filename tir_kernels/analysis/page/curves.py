"""Curves of tracked measures: through training, and from block to block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import NamedTuple

import numpy as np

from tir_kernels.analysis.figures import INK, Line, Lines, Point
from tir_kernels.analysis.page.comparison import CHANGE
from tir_kernels.analysis.page.tables import Cell, Table
from tir_kernels.fewshot.methods.families import legend
from tir_kernels.fewshot.run.ablation import last_minus_first
from tir_kernels.fewshot.run.shown_arms import ShownArm
from tir_kernels.fewshot.run.summary import Estimate, paired
from tir_kernels.fewshot.run.tracked import Track

BEFORE = "before training"


class Readings(NamedTuple):
    """One quantity in one (episode, arm).

    Attributes:
        steps: Steps taken before each reading.
        blocks: Its blocks.
        values: (steps, blocks); NaN where none was found.
        change: See ``last_minus_first``.
    """

    steps: tuple[int, ...]
    blocks: tuple[int | None, ...]
    values: np.ndarray
    change: float | None

    def means(self) -> dict[int, float]:
        """Step -> mean over the blocks in which it was found."""
        rows = (
            (step, row[~np.isnan(row)]) for step, row in zip(self.steps, self.values, strict=True)
        )
        return {step: fmean(row) for step, row in rows if row.size}

    def at(self, *, end: bool) -> dict[int, float]:
        """Block -> value, at the first or at the last step at which any was found."""
        (found,) = np.nonzero(~np.isnan(self.values).all(1))
        if not found.size:
            return {}
        row = self.values[found[-1 if end else 0]]
        return {
            block: float(value)
            for block, value in zip(self.blocks, row, strict=True)
            if block is not None and not np.isnan(value)
        }


class Quantity(NamedTuple):
    """All numbers of one quantity.

    Attributes:
        measure: Name of its measure in the registry.
        name: Its own name.
        readings: Arm -> episode -> what was read.
        chance: Block -> mean chance level, where there is one.
        blocks: Its blocks; none if it is of the whole tower.
    """

    measure: str
    name: str
    readings: dict[str, dict[int, Readings]]
    chance: dict[int | None, float]
    blocks: tuple[int, ...]

    def through_training(self, arm: str) -> dict[int, dict[int, float]]:
        """Step -> episode -> mean over the blocks in which it was found."""
        found: dict[int, dict[int, float]] = {}
        for episode, own in self.readings.get(arm, {}).items():
            for step, value in own.means().items():
                found.setdefault(step, {})[episode] = value
        return dict(sorted(found.items()))

    def in_blocks(self, arm: str, *, at_end: bool) -> dict[int, dict[int, float]]:
        """Block -> episode -> value, at the first or at the last step that an episode has."""
        found: dict[int, dict[int, float]] = {}
        for episode, own in self.readings.get(arm, {}).items():
            for block, value in own.at(end=at_end).items():
                found.setdefault(block, {})[episode] = value
        return dict(sorted(found.items()))

    def is_trained(self, arm: str) -> bool:
        """Whether an arm has values at more than one step."""
        return len(self.through_training(arm)) > 1

    def change(self, arm: str) -> dict[int, float]:
        """Episode -> change from its first step to its last."""
        own = self.readings.get(arm, {})
        return {
            episode: own[episode].change  # type: ignore[misc]
            for episode in sorted(own)
            if own[episode].change is not None
        }


def quantities(tracks: Iterable[Track]) -> list[Quantity]:
    """The quantities that tracks tell of, in their order."""
    found: dict[tuple[str, str], Quantity] = {}
    # Block -> sum and number of its chance levels.
    levels: dict[tuple[str, str], dict[int | None, tuple[float, int]]] = {}
    for track in tracks:
        steps = tuple(track.steps)
        for series in track.series:
            key = series.measure, series.name
            own = found.setdefault(key, Quantity(*key, {}, {}, ()))
            values = np.array(series.values, float).reshape(len(steps), len(series.blocks))
            readings = Readings(steps, tuple(series.blocks), values, last_minus_first(series))
            own.readings.setdefault(track.arm, {})[track.episode] = readings
            sums = levels.setdefault(key, {})
            for row in series.chance:
                for block, level in zip(series.blocks, row, strict=True):
                    total, count = sums.get(block, (0.0, 0))
                    sums[block] = (total, count) if level is None else (total + level, count + 1)
    return [
        own._replace(
            chance={block: total / count for block, (total, count) in levels[key].items() if count},
            blocks=tuple(sorted(block for block in levels[key] if block is not None)),
        )
        for key, own in found.items()
    ]


def by_step(quantity: Quantity, styles: Mapping[str, int]) -> Lines:
    """A quantity through training, averaged over blocks, with a line for each arm.

    Args:
        quantity: The quantity.
        styles: Arm -> style of its line.
    """
    lines = [
        Line(arm, style, _points(quantity.through_training(arm))) for arm, style in styles.items()
    ]
    ends = _ends(lines)
    levels = list(quantity.chance.values())
    chance = [(x, fmean(levels)) for x in ends] if levels else []
    return Lines(quantity.name, "training step", tuple(lines), tuple(chance))


def by_block(quantity: Quantity, styles: Mapping[str, int]) -> Lines:
    """A quantity from block to block after training, and before it; of arms that train."""
    lines = [Line(BEFORE, INK, points_in_blocks(quantity, list(styles), at_end=False))]
    lines += [
        Line(arm, style, points_in_blocks(quantity, [arm], at_end=True))
        for arm, style in styles.items()
        if quantity.is_trained(arm)
    ]
    chance = sorted((b, level) for b, level in quantity.chance.items() if b is not None)
    return Lines(quantity.name, "block", tuple(lines), tuple(chance))


def points_in_blocks(quantity: Quantity, arms: Iterable[str], *, at_end: bool) -> tuple[Point, ...]:
    """Means from block to block, at the first step or at the last.

    Args:
        quantity: The quantity.
        arms: Arms of which any will do, as before training, where all have the same weights.
        at_end: Whether to take each episode's last step.
    """
    found: dict[int, dict[int, float]] = {}
    for arm in arms:
        for block, episodes in quantity.in_blocks(arm, at_end=at_end).items():
            found.setdefault(block, {}).update(episodes)
    return _points(dict(sorted(found.items())))


def change_table(
    found: Iterable[Quantity], shown: Mapping[str, ShownArm], baseline: str
) -> Table | None:
    """The change of each quantity from the first step to the last, and paired differences of it.

    Args:
        found: The quantities.
        shown: How readers see the arms, by their names.
        baseline: The arm that others are compared with.

    Returns:
        ``None`` if nothing was tracked through training.
    """
    changes = [(each, {arm: each.change(arm) for arm in shown}) for each in found]
    arms = [arm for arm in shown if any(own[arm] for _, own in changes)]
    if not arms:
        return None
    others = [arm for arm in arms if arm != baseline] if baseline in arms else []
    rows: list[tuple[Cell, ...]] = []
    for quantity, own in changes:
        if any(own.values()):
            alone = [Estimate.of(list(own[arm].values())) for arm in arms]
            pairs = [paired(own[arm], own[baseline]) for arm in others]
            cells = [CHANGE.of(each, is_signed=True) for each in (*alone, *pairs)]
            rows.append((quantity.name, *cells))
    return Table(
        "Change of each measure from the first step to the last",
        (
            "measure",
            *(shown[arm].labelled for arm in arms),
            *(f"{arm} − {baseline}" for arm in others),
        ),
        tuple(rows),
        (
            "Mean over episodes ± 95 % interval; each is first averaged over blocks and images. "
            "Many rows are compared at once: of twenty intervals, one leaves out 0 by chance.",
            legend(shown[arm].label for arm in arms),
        ),
    )


def _points(found: Mapping[int, Mapping[int, float]]) -> tuple[Point, ...]:
    return tuple(Point(x, Estimate.of(list(own.values()))) for x, own in found.items())


def _ends(lines: Iterable[Line]) -> Iterator[float]:
    xs = [point.x for line in lines for point in line.points]
    return iter((min(xs), max(xs)) if xs else ())
