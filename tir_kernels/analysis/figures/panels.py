"""The content of figures, without a thought of how it is drawn."""

from __future__ import annotations

from typing import NamedTuple

from tir_kernels.fewshot.run.summary import Estimate

INK = -1  # the style of what belongs to no arm: drawn like text


class Point(NamedTuple):
    """A mean over episodes at a place.

    Attributes:
        x: Step, or number of a block.
        value: Mean, with its interval.
    """

    x: float
    value: Estimate


class Line(NamedTuple):
    """A line through means, in a band of their intervals.

    Attributes:
        label: Name, as an arm's.
        style: Number of colour and dashes, or ``INK``. An arm has the same one in all figures.
        points: Its points, by x.
    """

    label: str
    style: int
    points: tuple[Point, ...]


class Lines(NamedTuple):
    """A panel of lines.

    Attributes:
        title: Quantity that is shown.
        x_label: Axis below: "step" or "block".
        lines: Lines; none, or those without any mean, are "none found".
        chance: (x, value) of the level that chance would give; empty if there is none.
    """

    title: str
    x_label: str
    lines: tuple[Line, ...]
    chance: tuple[tuple[float, float], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether no line has a value."""
        return all(point.value.mean is None for line in self.lines for point in line.points)


class Dots(NamedTuple):
    """A panel with a row for each arm: each episode's value, their mean and its interval.

    Attributes:
        title: Quantity that is shown.
        x_label: Axis below.
        rows: (arm, style, value by episode, their mean).
        chance: Level that chance would give, or ``None``.
    """

    title: str
    x_label: str
    rows: tuple[tuple[str, int, tuple[float, ...], Estimate], ...]
    chance: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no row has a value."""
        return not any(values for _, _, values, _ in self.rows)


class Ranks(NamedTuple):
    """A critical-difference diagram: mean ranks on an axis, and bars over what no test separates.

    Attributes:
        title: Quantity that is ranked.
        rows: (name, style, mean rank), at least two.
        p_values: Of the tests of each row with each.
        significance: Below which p separates.
    """

    title: str
    rows: tuple[tuple[str, int, float], ...]
    p_values: tuple[tuple[float, ...], ...]
    significance: float

    @property
    def is_empty(self) -> bool:
        """Whether there is no row."""
        return not self.rows


class Chart(NamedTuple):
    """Panels that belong together, and are one file.

    Attributes:
        name: Stem of the files.
        title: Subject of the panels.
        panels: Its panels.
        legend: (label, style) of all lines.
        is_ordered: Whether styles are numbers on a scale, such as counts, and no names.
    """

    name: str
    title: str
    panels: tuple[Lines | Dots | Ranks, ...]
    legend: tuple[tuple[str, int], ...] = ()
    is_ordered: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether its panel has a row of its own."""
        return any(isinstance(panel, Ranks) for panel in self.panels)
