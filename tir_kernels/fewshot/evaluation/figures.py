"""Figures of an evaluation: the confusion matrix, and the reliability of probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from tir_kernels.analysis.figures import Chart, Drawing, Lines
from tir_kernels.analysis.figures.drawing import drawn, own_settings
from tir_kernels.analysis.figures.elements import PANEL
from tir_kernels.analysis.figures.styles import ARMS, MUTED
from tir_kernels.fewshot.evaluation.evaluation import Evaluation
from tir_kernels.text import printable

_WITH_NUMBERS = 12  # classes
_WITH_NAMES = 40
_SHORT = 20  # characters of a name

_WITHOUT_GRID = {"axes.grid": False}


def confusion_figure(found: Evaluation) -> Drawing:
    """The confusion matrix, its rows in shares of each class's images."""
    counts = np.array(found.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = len(found.labels) <= _WITH_NAMES
    size = min(2.2 + 0.28 * len(found.labels), 8.0) if names else 5.0

    def fill(axes: Axes) -> None:
        every = np.arange(len(found.labels))
        # One colour of growing opacity, so that it may stand on a light page and on a dark one.
        colours = np.empty((*shares.shape, 4))
        colours[...] = to_rgba(ARMS[0].light)
        colours[..., 3] = shares
        mesh = axes.pcolormesh(colours)
        mesh.set_rasterized(len(every) > _WITH_NAMES)
        axes.set_ylim(len(every), 0)
        axes.set_aspect("equal")
        axes.set_xlabel("answer")
        axes.set_ylabel("class")
        if names:
            labels = [_short(label) for label in found.labels]
            axes.set_xticks(every + 0.5, labels, rotation=90)
            axes.set_yticks(every + 0.5, labels)
        axes.tick_params(length=0)
        if len(every) <= _WITH_NUMBERS:
            for row, column in zip(*np.nonzero(counts), strict=True):
                text = str(counts[row, column])
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7)

    widest = max(len(_short(label)) for label in found.labels)
    margin = 0.45 + 0.075 * widest if names else 0.7
    return _drawn("confusion", "Confusion matrix", (size + margin, size + margin), margin, fill)


def reliability_figure(found: Evaluation) -> Drawing:
    """Accuracy against confidence, and how many images have which confidence."""
    bins = found.calibration.bins
    points = [
        (each.confidence, each.accuracy)
        for each in bins
        if each.confidence is not None and each.accuracy is not None
    ]

    def fill(axes: Axes) -> None:
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        shares = [each.images / found.images for each in bins]
        lows = [each.low for each in bins]
        width = bins[0].high - bins[0].low
        axes.bar(lows, shares, width, align="edge", color=MUTED.light, alpha=0.25)
        line: dict[str, Any] = {"linewidth": 1, "linestyle": (0, (1, 2))}
        axes.plot([0, 1], [0, 1], color=MUTED.light, **line)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=ARMS[0].light, marker="o", markersize=3.5, linewidth=1.5)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence (bars: share of the images)")
        axes.set_ylabel("accuracy")

    return _drawn("reliability", "Reliability", (3.6, 3.0), 0.55, fill)


def _drawn(
    name: str,
    title: str,
    size: tuple[float, float],
    margin: float,
    fill: Callable[[Axes], None],
) -> Drawing:
    """One panel as SVG and PNG, and for a page.

    Args:
        name: Stem of the files.
        title: Subject.
        size: Inches.
        margin: Inches to the left and below.
        fill: Draws into the axes.
    """
    with own_settings(name, _WITHOUT_GRID):
        figure = Figure(figsize=size)
        width, height = size
        place = (
            margin / width,
            margin / height,
            (width - margin - 0.15) / width,
            (height - margin - 0.15) / height,
        )
        axes = figure.add_axes(place)
        axes.set_gid(PANEL.format(0))
        fill(axes)
        chart = Chart(name, title, (Lines(title, "", ()),))
        return drawn(figure, chart, [(0.0, 0.0, 72 * width, 72 * height)])


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 1]}…"
