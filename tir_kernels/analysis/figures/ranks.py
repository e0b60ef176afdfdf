"""The critical-difference diagram of scikit-posthocs, in the looks of our figures."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame
from scikit_posthocs import critical_difference_diagram

from tir_kernels.analysis.figures.elements import PANEL, Place
from tir_kernels.analysis.figures.panels import Ranks
from tir_kernels.analysis.figures.styles import MUTED, TEXT, shade
from tir_kernels.text import printable

_AXIS, _LINE, _LETTER = 2.4, 0.19, 0.066  # inches: of the axis, a row, and a letter at most
_LONGEST = 34  # letters of a name


def ranks_figure(panel: Ranks) -> tuple[Figure, list[Place]]:
    """The figure of a diagram, and its place in points; to be called within ``own_settings``.

    The best half of the names stands on the left, the others on the right, each with its rank.
    """
    # Numbers for names: the library takes two rows of one name for one.
    keys = [str(number) for number in range(len(panel.rows))]
    values = [value for _, _, value in panel.rows]
    names = {key: _short(name) for key, (name, _, _) in zip(keys, panel.rows, strict=True)}
    figure = Figure()
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_gid(PANEL.format(0))
    axes.grid(False)
    axes.spines["top"].set_visible(True)
    low, high = math.floor(min(values)), math.ceil(max(values))
    if low == high:
        low, high = low - 1, high + 1
    gap = 0.03 * (high - low)
    artists = critical_difference_diagram(
        dict(zip(keys, values, strict=True)),
        DataFrame(panel.p_values, index=keys, columns=keys),
        alpha=panel.significance,
        ax=axes,
        label_fmt_left="{label}",
        label_fmt_right="{label}",
        label_props={"fontsize": 8},
        marker_props={"s": 14},
        elbow_props={"linewidth": 0.9},
        crossbar_props={"color": TEXT.light, "linewidth": 2.2, "solid_capstyle": "round"},
        color_palette={
            key: shade(style, 0, False).light
            for key, (_, style, _) in zip(keys, panel.rows, strict=True)
        },
        text_h_margin=gap,
    )
    longest = {"right": 0, "left": 0}  # letters of a text, by its alignment
    for text in artists["labels"]:
        key, side = text.get_text(), text.get_horizontalalignment()
        parts = (names[key], f"{values[int(key)]:.2f}")
        text.set_text("  ".join(parts if side == "right" else parts[::-1]))
        text.set_color(TEXT.light)
        text.set_x(text.get_position()[0] + (-gap if side == "right" else gap) / 2)
        longest[side] = max(longest[side], len(text.get_text()))
    lowest = min(text.get_position()[1] for text in artists["labels"])
    axes.set_xlim(low - gap, high + gap)
    axes.set_ylim(lowest - 0.6, 0.1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(axis="x", colors=MUTED.light, length=2.5)
    left, right = (0.15 + _LETTER * longest[side] for side in ("right", "left"))
    above, height = 0.3, _LINE * (0.7 - lowest)
    width, total = left + _AXIS + right, above + height
    figure.set_size_inches(width, total)
    axes.set_position((left / width, 0, _AXIS / width, height / total))
    return figure, [(0.0, 0.0, 72 * width, 72 * total)]


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
