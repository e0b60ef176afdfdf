"""The HTML file of a report, and the files of its figures."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from tir_kernels.analysis.figures import Chart, Dots, Drawing, Ranks, draw
from tir_kernels.analysis.figures.styles import SHADES, dashes, shade
from tir_kernels.analysis.page.accuracy import accuracy_table, episodes_of, verdict
from tir_kernels.analysis.page.columns import blocks_of
from tir_kernels.analysis.page.comparison import comparison_tables
from tir_kernels.analysis.page.curves import change_table
from tir_kernels.analysis.page.environment import environment
from tir_kernels.analysis.page.field import field_tables, quoted_beside
from tir_kernels.analysis.page.figure_files import write_figures
from tir_kernels.analysis.page.gallery import COLOURS
from tir_kernels.analysis.page.runs import ReportedRun, load_runs
from tir_kernels.analysis.page.sections import BY_BLOCK, Section, field_sections, run_sections
from tir_kernels.analysis.page.tables import (
    FORMATS,
    Cell,
    Table,
    download,
    place_of,
    shown,
    titled,
    written,
)
from tir_kernels.analysis.page.terminal import terminal_text
from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.folder import expanded_out, write_whole
from tir_kernels.files import MIB, read_bytes
from tir_kernels.text import setting

LARGEST = 2_000_000  # bytes of a page
_PICTURES = 5  # images of a gallery, where there is room for them
_MARK = b"<!doctype html>\n<!-- written by tir-finetune -->\n"
_KINDS = {"csv": "text/csv", "markdown": "text/markdown", "latex": "application/x-tex"}


class Part(NamedTuple):
    """The sections of one run, or of all runs together.

    Attributes:
        title: Name of the run; empty for what all runs share.
        lead: The findings in a few sentences.
        facts: What was run on what.
        sections: Its sections.
    """

    title: str
    lead: str
    facts: str
    sections: Sequence[Section]


def write_page(
    folders: Sequence[str | Path], out: str | Path, *, baseline: str | None = None
) -> Path:
    """Write the page of one run or several, and its figures into a folder beside it.

    Args:
        folders: Folders of runs, finished or not.
        out: HTML file to write; the figures' folder has its name with ``-figures`` for the ending.
        baseline: The arm that others are compared with, see ``load_runs``.

    Returns:
        The file.

    Raises:
        FewShotError: A run can't be read, or a file can't be written or is not a page's.
    """
    path = expanded_out(out)
    _refuse_others_file(path)
    runs = load_runs(folders, baseline)
    page, drawings = _fitting_page(runs, baseline)
    write_figures(path.with_name(f"{path.stem}-figures"), drawings)
    write_whole(path, page)
    return path


def tables_text(folders: Sequence[str | Path], style: str, *, baseline: str | None = None) -> str:
    """The tables of one run or several as text, see ``tables.written``.

    Args:
        folders: Folders of runs, finished or not.
        style: "csv", "markdown", "latex", or "text" for a terminal.
        baseline: As for ``write_page``.

    Raises:
        FewShotError: A run can't be read.
        ValueError: There is no such style.
    """
    runs = load_runs(folders, baseline)
    if len(runs) > 1:
        tables = [table for block in blocks_of(runs, baseline) for table in field_tables(block)]
    else:
        (run,) = runs
        tables = [accuracy_table(run), *quoted_beside(run)]
        tables += comparison_tables(run.ablation) if len(run.arms) > 1 else []
        changes = change_table(run.found, run.shown, run.baseline)
        tables += [] if changes is None else [changes]
    return terminal_text(tables) if style == "text" else titled(tables, style)


def _refuse_others_file(path: Path) -> None:
    try:
        if not path.exists() and not path.is_symlink():
            return
        is_ours = read_bytes(path, at_most=64 * MIB).startswith(_MARK)
    except OSError as error:
        raise FewShotError(f"{setting('out')}: can't read {path}: {first_line(error)}") from error
    if not is_ours:
        raise FewShotError(
            f"{setting('out')}: {path} is not a report; choose another name, or move that file"
        )


def _styles(runs: Sequence[ReportedRun]) -> dict[str, int]:
    """Arm -> number of its colour and dashes, the same in all runs."""
    arms = dict.fromkeys(arm for run in runs for arm in run.arms)
    return {arm: number for number, arm in enumerate(arms)}


def _fitting_page(
    runs: Sequence[ReportedRun], baseline: str | None
) -> tuple[bytes, dict[str, Drawing]]:
    """The page, without its least important parts if it would be too large otherwise.

    Args:
        runs: The runs.
        baseline: As for ``write_page``.

    Returns:
        The page, and all drawings by their names, also those without room in it.
    """
    styles = _styles(runs)
    pictures = -(-_PICTURES // len(runs))
    parts = []
    if len(runs) > 1:
        parts.append(Part("", "", "", field_sections(blocks_of(runs, baseline), styles)))
    for number, run in enumerate(runs):
        prefix = f"{number}-" if len(runs) > 1 else ""
        sections = run_sections(run, styles, prefix, pictures)
        parts.append(Part(run.name, verdict(run), _facts(run), sections))
    charts = [chart for part in parts for section in part.sections for chart in section.charts]
    drawings = {chart.name: draw(chart) for chart in charts}
    # Markup by our own drawing, in which names are escaped.
    drawn = {name: [Markup(panel) for panel in own.panels] for name, own in drawings.items()}
    lean = {name: own for name, own in drawn.items() if not name.endswith(BY_BLOCK)}
    beside = "lie in the folder beside this file alone"
    page = _rendered(runs, parts, styles, drawn, "", is_packed=False)
    for least, figures, note in (
        (pictures, drawn, ""),  # with the figures' data packed
        (pictures, lean, f"Curves from block to block {beside}, for their size."),
        (1, lean, f"Curves from block to block {beside}, and pictures are fewer, for their size."),
        (0, lean, f"Curves from block to block {beside}, and pictures are left out, for size."),
        (0, {}, f"Figures {beside}, and pictures are left out, for their size."),
    ):
        if len(page) <= LARGEST:
            break
        fewer = [part._replace(sections=_with_pictures(part.sections, least)) for part in parts]
        page = _rendered(runs, fewer, styles, figures, note, is_packed=True)
    return page, drawings


def _with_pictures(sections: Sequence[Section], count: int) -> list[Section]:
    """Sections whose galleries have no more than so many pictures; none is left out."""
    return [
        section
        if section.gallery is None
        else section._replace(
            gallery=section.gallery._replace(pictures=section.gallery.pictures[:count])
        )
        for section in sections
        if section.gallery is None or count
    ]


def _facts(run: ReportedRun) -> str:
    sizes = [
        f"{run.settings[name]} {name.removesuffix('s') if run.settings[name] == 1 else name}"
        for name in ("ways", "shots")
        if name in run.settings
    ]
    parts = [
        f"{run.about.get('data', 'unknown data')}, {run.about.get('model', 'unknown model')}",
        *sizes,
        f"{episodes_of(run)} of {run.episodes} episodes",
    ]
    return " · ".join(parts)


def _rendered(
    runs: Sequence[ReportedRun],
    parts: list[Part],
    styles: dict[str, int],
    drawn: dict[str, list[Markup]],
    note: str,
    is_packed: bool,
) -> bytes:
    title = runs[0].name
    if len(runs) > 1:
        title = f"{len(runs)} runs"
    templates = environment(
        shown=shown,
        place_of=place_of,
        downloads=_downloads,
        data_ending="csv.gz" if is_packed else "csv",
        chart_download=lambda chart: _chart_download(chart, is_packed),
        stroke=_stroke,
        shade=shade,
        slug=lambda text: "".join(char if char.isalnum() else "-" for char in text).lower(),
    )
    text = templates.get_template("page.html.j2").render(
        title=title,
        parts=parts,
        styles=styles,
        drawn=drawn,
        note=note,
        shades=SHADES,
        map_colours=COLOURS,
    )
    return _MARK + text.encode()


def _downloads(table: Table) -> list[tuple[str, str, str]]:
    """Format, ending and address of each form of a table."""
    return [
        (style, ending, download(written(table, style), _KINDS[style]))
        for style, ending in FORMATS.items()
    ]


def _chart_download(chart: Chart, is_packed: bool) -> str:
    text = written(_data(chart), "csv")
    if not is_packed:
        return download(text, "text/csv")
    return download(gzip.compress(text.encode(), mtime=0), "application/gzip")


def _data(chart: Chart) -> Table:
    """All numbers of a chart in long form."""
    rows: list[tuple[Cell, ...]] = []
    columns = ("panel", "line", "at", "value", "half of the 95 % interval", "episodes")
    for panel in chart.panels:
        if isinstance(panel, Ranks):
            rows += [
                (panel.title, arm, "mean rank", rank, None, None) for arm, _, rank in panel.rows
            ]
            continue
        if isinstance(panel, Dots):
            for arm, _, values, mean in panel.rows:
                rows.append((panel.title, arm, "mean", mean.mean, mean.half_width, mean.episodes))
                rows += [(panel.title, arm, "one episode", value, None, 1) for value in values]
            continue
        for line in panel.lines:
            rows += [
                (panel.title, line.label, x, mean.mean, mean.half_width, mean.episodes)
                for x, mean in line.points
            ]
        rows += [(panel.title, "chance", x, level, None, None) for x, level in panel.chance]
    return Table(chart.title, columns, tuple(rows))


def _stroke(style: int, total: int, is_ordered: bool) -> str:
    """The dashes of a line in a legend, in pixels; empty for a solid one."""
    pattern = dashes(style, is_ordered)
    return "" if pattern == "solid" else " ".join(f"{2 * length:g}" for length in pattern[1])
