"""Drawing of panels by Matplotlib, without a trace in its global state."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from tir_kernels.analysis.figures.elements import FONT, PANEL, TITLE, Place, page_elements
from tir_kernels.analysis.figures.panels import Chart, Dots, Lines, Ranks
from tir_kernels.analysis.figures.styles import GRID, MUTED, TEXT, dashes, shade
from tir_kernels.text import printable

_WIDTH, _HEIGHT = 3.3, 2.15  # inches of a panel
_TITLE = 0.22  # inches for one above a panel
_LABEL = 0.25  # inches from the axes to the label below them: ticks, their numbers, and gaps
_COLUMNS = 3
_DPI = 160

_NO_CHANGES: Mapping[Any, Any] = {}
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": [FONT],
    "font.size": 8,
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED.light,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED.light,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": TEXT.light,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "axes.titley": 1.0,
    "grid.color": GRID.light,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "text.color": TEXT.light,
    "text.parse_math": False,  # names are shown as they are
    "xtick.color": MUTED.light,
    "ytick.color": MUTED.light,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
    "xtick.major.width": 0.6,
}


class Drawing(NamedTuple):
    """A drawn chart.

    Attributes:
        svg, png: Files of all its panels.
        panels: Each as an SVG element for a page that has the colours' custom properties.
    """

    svg: bytes
    png: bytes
    panels: tuple[str, ...]


def draw(chart: Chart) -> Drawing:
    """Draw a chart, once for all forms of it: Matplotlib takes most of a report's time."""
    with own_settings(chart.name):
        first = chart.panels[0]
        if isinstance(first, Ranks):
            # Here, since its libraries are an extra.
            from tir_kernels.analysis.figures.ranks import ranks_figure

            figure, places = ranks_figure(first)
        else:
            figure, places = _whole(chart)
        return drawn(figure, chart, places)


def drawn(figure: Figure, chart: Chart, places: Sequence[Place]) -> Drawing:
    """All forms of a figure; to be called within ``own_settings``.

    Args:
        figure: The figure, whose axes have the identifiers of panels.
        chart: Name and title, and what the panels show.
        places: Left, top, width and height of each panel in points.
    """
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    source = file.getvalue()
    figure.set_facecolor("white")
    figure.set_dpi(_DPI)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return Drawing(source, file.getvalue(), tuple(page_elements(source, chart, places)))


@contextlib.contextmanager
def own_settings(salt: str, changes: Mapping[Any, Any] = _NO_CHANGES) -> Iterator[None]:
    """Matplotlib's defaults and ours, whatever the user has set; the same content, the same bytes.

    For as long as something is drawn: no garbage is looked for meanwhile.

    Args:
        salt: Tells the identifiers of figures apart that stand in one page.
        changes: Settings that differ, by Matplotlib's names.
    """
    with matplotlib.rc_context(), warnings.catch_warnings(), _uncollected():
        # The font of PNG files has not all the world's letters; in SVG, the browser's are used.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_SETTINGS, "svg.hashsalt": salt, **changes})
        yield


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Don't look for garbage among what Matplotlib makes, a fifth of the time: it is all in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _height(panel: Lines | Dots) -> float:
    return 0.55 + 0.27 * len(panel.rows) if isinstance(panel, Dots) else _HEIGHT


class _Margins(NamedTuple):
    """Room around the axes of each panel, in inches."""

    left: float
    right: float
    above: float
    below: float


def _margins(chart: Chart, above: float) -> _Margins:
    names = [row[0] for panel in chart.panels if isinstance(panel, Dots) for row in panel.rows]
    widest = max((len(_short(name)) for name in names), default=6)
    return _Margins(0.12 + 0.065 * widest, 0.08, above, 0.38)


def _sheet(
    heights: Sequence[Sequence[float]], margins: _Margins, foot: float = 0.0
) -> tuple[Figure, list[Axes], list[Place]]:
    """A figure of axes in rows, placed by hand, since Matplotlib's layouts take long.

    Args:
        heights: Rows -> columns -> inches of a panel.
        margins: Room in each panel.
        foot: Inches below all panels.

    Returns:
        The figure, its axes, and the place of each panel, without a title's, in points.
    """
    width = _WIDTH * max(map(len, heights))
    total = sum(map(max, heights)) + foot
    figure = Figure(figsize=(width, total))
    axes, places = [], []
    top = total
    for row in heights:
        for column, height in enumerate(row):
            left, below = column * _WIDTH + margins.left, top - height + margins.below
            size = _WIDTH - margins.left - margins.right, height - margins.above - margins.below
            place = (left / width, below / total, size[0] / width, size[1] / total)
            axes.append(figure.add_axes(place))
            # Titles and labels too: to find their places, all that is drawn would be measured.
            below_axes = ScaledTranslation(0, -_LABEL, figure.dpi_scale_trans)
            axes[-1].xaxis.set_label_coords(0.5, 0, axes[-1].transAxes + below_axes)
            axes[-1].yaxis.set_label_coords(0, 0)  # there is none
            corner = column * _WIDTH, total - top + _TITLE, _WIDTH, height - _TITLE
            places.append(tuple(72 * inches for inches in corner))
        top -= max(row)
    return figure, axes, places


def _whole(chart: Chart) -> tuple[Figure, list[Place]]:
    panels = [panel for panel in chart.panels if not isinstance(panel, Ranks)]  # drawn elsewhere
    heights = [_height(panel) + _TITLE for panel in panels]
    columns = min(_COLUMNS, len(heights))
    rows = [heights[start : start + columns] for start in range(0, len(heights), columns)]
    entries = 2 * columns  # of the legend in a row
    foot = 0.1 + 0.2 * math.ceil(len(chart.legend) / entries) if chart.legend else 0.0
    figure, all_axes, places = _sheet(rows, _margins(chart, above=_TITLE + 0.08), foot)
    for number, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
        axes.set_gid(PANEL.format(number))
        _draw(axes, chart, panel)
        axes.set_title(_short(panel.title, 52), gid=TITLE)
    if chart.legend:
        handles = [Line2D([], [], **_line_style(chart, style)) for _, style in chart.legend]
        numbers = [str(number) for number in range(len(handles))]
        legend = figure.legend(handles, numbers, loc="lower left", ncols=entries, frameon=False)
        # Set afterwards: a legend leaves out labels that begin with an underscore.
        for text, (label, _) in zip(legend.get_texts(), chart.legend, strict=True):
            text.set_text(_short(label))
    return figure, places


def _short(name: str, limit: int = 24) -> str:
    """A name in which nothing hides, no longer than there is room for."""
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _line_style(chart: Chart, style: int) -> dict[str, Any]:
    colour = shade(style, len(chart.legend), chart.is_ordered).light
    return {"color": colour, "linestyle": dashes(style, chart.is_ordered)}


def _draw(axes: Axes, chart: Chart, panel: Lines | Dots) -> None:
    if panel.is_empty:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "none found", ha="center", color=MUTED.light, transform=axes.transAxes)
    elif isinstance(panel, Dots):
        _draw_dots(axes, panel)
    else:
        _draw_lines(axes, chart, panel)


def _draw_lines(axes: Axes, chart: Chart, panel: Lines) -> None:
    for line in panel.lines:
        style = _line_style(chart, line.style)
        # Triples of x, mean and half of the interval's width.
        found = [
            (x, value.mean, value.half_width) for x, value in line.points if value.mean is not None
        ]
        axes.plot([x for x, *_ in found], [mean for _, mean, _ in found], **style)
        if len(found) == 1:
            axes.plot(*found[0][:2], marker="o", markersize=4, color=style["color"])
        banded = [(x, mean, half) for x, mean, half in found if half is not None]
        axes.fill_between(
            [x for x, *_ in banded],
            [mean - half for _, mean, half in banded],
            [mean + half for _, mean, half in banded],
            color=style["color"],
            alpha=min(0.14, 0.6 / len(panel.lines)),  # the bands of many would hide their lines
            linewidth=0,
        )
    if panel.chance:
        dotted: dict[str, Any] = {"linewidth": 1, "linestyle": (0, (1, 2))}
        axes.plot(*zip(*panel.chance, strict=True), color=MUTED.light, **dotted)
        axes.annotate(
            "chance",
            panel.chance[-1],
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7,
            color=MUTED.light,
        )
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02, y=0.12)
    if chart.is_ordered:  # what one compares there are the panels
        axes.set_ylim(*_limits(chart))


def _limits(chart: Chart) -> tuple[float, float]:
    """Ends of a vertical axis for all panels: of the means, since one wide band would hide them."""
    values = [
        point.value.mean
        for panel in chart.panels
        if isinstance(panel, Lines)
        for line in panel.lines
        for point in line.points
        if point.value.mean is not None
    ]
    low, high = min(values), max(values)
    margin = 0.2 * (high - low) or 1.0
    return low - margin, high + margin


def _draw_dots(axes: Axes, panel: Dots) -> None:
    for place, (_, style, values, mean) in enumerate(panel.rows):
        colour = shade(style, 0, False).light
        axes.plot(
            values,
            [place + 0.22] * len(values),
            linestyle="none",
            marker="|",
            markersize=5,
            color=colour,
            alpha=0.45,
        )
        if mean.mean is None:
            axes.annotate("none found", (0.02, place), xycoords=("axes fraction", "data"))
            continue
        if mean.half_width is not None:
            ends = [mean.mean - mean.half_width, mean.mean + mean.half_width]
            axes.plot(ends, [place, place], color=colour, solid_capstyle="round", linewidth=2.2)
        axes.plot([mean.mean], [place], marker="o", markersize=5, color=colour)
    axes.set_yticks(range(len(panel.rows)), [_short(name) for name, *_ in panel.rows])
    axes.tick_params(axis="y", labelcolor=TEXT.light)
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.spines["left"].set_visible(False)
    if panel.chance is not None:
        axes.axvline(panel.chance, color=MUTED.light, linewidth=1, linestyle=(0, (1, 2)))
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(6))
