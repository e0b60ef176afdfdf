"""Curves of tracked measures: through training, and from block to block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import NamedTuple

from tir_kernels.analysis.figures import INK, Line, Lines, Point
from tir_kernels.analysis.page.tables import Cell, Table, Value
from tir_kernels.fewshot.run.summary import Estimate, paired
from tir_kernels.fewshot.run.tracked import Tracked

BEFORE = "before training"


class Quantity(NamedTuple):
    """All numbers of one quantity.

    Attributes:
        measure: Name of its measure in the registry.
        name: Its own name.
        values: Arm -> (episode, step, block) -> value; what was not found is left out.
        chance: Block -> mean chance level, where there is one.
        blocks: Its blocks; none if it is of the whole tower.
    """

    measure: str
    name: str
    values: dict[str, dict[tuple[int, int, int | None], float]]
    chance: dict[int | None, float]
    blocks: tuple[int, ...]

    def through_training(self, arm: str) -> dict[int, dict[int, float]]:
        """Step -> episode -> mean over the blocks in which it was found."""
        own: dict[int, dict[int, list[float]]] = {}
        for (episode, step, _), value in self.values.get(arm, {}).items():
            own.setdefault(step, {}).setdefault(episode, []).append(value)
        return {
            step: {episode: fmean(each) for episode, each in episodes.items()}
            for step, episodes in sorted(own.items())
        }

    def in_blocks(self, arm: str, *, at_end: bool) -> dict[int, dict[int, float]]:
        """Block -> episode -> value, at the first or at the last step that an episode has."""
        own = self.values.get(arm, {})
        wanted: dict[int, int] = {}
        choose = max if at_end else min
        for episode, step, _ in own:
            wanted[episode] = choose(wanted.get(episode, step), step)
        found: dict[int, dict[int, float]] = {}
        for (episode, step, block), value in own.items():
            if block is not None and step == wanted[episode]:
                found.setdefault(block, {})[episode] = value
        return dict(sorted(found.items()))

    def is_trained(self, arm: str) -> bool:
        """Whether an arm has values at more than one step."""
        return len({step for _, step, _ in self.values.get(arm, {})}) > 1

    def change(self, arm: str) -> dict[int, float]:
        """Episode -> value at its last step minus that at its first."""
        steps: dict[int, dict[int, float]] = {}
        for step, episodes in self.through_training(arm).items():
            for episode, value in episodes.items():
                steps.setdefault(episode, {})[step] = value
        return {
            episode: own[max(own)] - own[min(own)]
            for episode, own in sorted(steps.items())
            if len(own) > 1
        }


def quantities(rows: Iterable[Tracked]) -> list[Quantity]:
    """The quantities that tracked rows tell of, in their order."""
    found: dict[tuple[str, str], Quantity] = {}
    chances: dict[tuple[str, str], dict[int | None, list[float]]] = {}
    for row in rows:
        key = row.measure, row.name
        quantity = found.setdefault(key, Quantity(*key, {}, {}, ()))
        own = quantity.values.setdefault(row.arm, {})
        if row.value is not None:
            own[row.episode, row.step, row.block] = row.value
        levels = chances.setdefault(key, {}).setdefault(row.block, [])
        if row.chance is not None:
            levels.append(row.chance)
    return [
        quantity._replace(
            chance={block: fmean(own) for block, own in chances[key].items() if own},
            blocks=tuple(sorted(block for block in chances[key] if block is not None)),
        )
        for key, quantity in found.items()
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
    found: Iterable[Quantity], styles: Mapping[str, int], baseline: str
) -> Table | None:
    """The change of each quantity from the first step to the last, and paired differences of it.

    Returns:
        ``None`` if nothing was tracked through training.
    """
    changes = [(each, {arm: each.change(arm) for arm in styles}) for each in found]
    arms = [arm for arm in styles if any(own[arm] for _, own in changes)]
    if not arms:
        return None
    others = [arm for arm in arms if arm != baseline] if baseline in arms else []
    rows: list[tuple[Cell, ...]] = []
    for quantity, own in changes:
        if any(own.values()):
            alone = [_change(Estimate.of(list(own[arm].values()))) for arm in arms]
            pairs = [_change(paired(own[arm], own[baseline])) for arm in others]
            rows.append((quantity.name, *alone, *pairs))
    return Table(
        "Change of each measure from the first step to the last",
        ("measure", *arms, *(f"{arm} − {baseline}" for arm in others)),
        tuple(rows),
        (
            "Mean over episodes ± 95 % interval; each is first averaged over blocks and images. "
            "Many rows are compared at once: of twenty intervals, one leaves out 0 by chance.",
        ),
    )


def _change(estimate: Estimate) -> Value:
    sizes = [abs(x) for x in (estimate.mean, estimate.half_width) if x]
    digits = max(0, min(6, 2 - math.floor(math.log10(max(sizes))))) if sizes else 3
    return Value(estimate, digits=digits, is_signed=True)


def _points(found: Mapping[int, Mapping[int, float]]) -> tuple[Point, ...]:
    return tuple(Point(x, Estimate.of(list(own.values()))) for x, own in found.items())


def _ends(lines: Iterable[Line]) -> Iterator[float]:
    xs = [point.x for line in lines for point in line.points]
    return iter((min(xs), max(xs)) if xs else ())
