"""The files of an evaluation: numbers, tables, figures, and one page of all of them."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup

from tir_kernels.analysis.figures.styles import SHADES
from tir_kernels.analysis.page.figure_files import write_figures
from tir_kernels.analysis.page.tables import Table, shown, written
from tir_kernels.fewshot.evaluation import tables
from tir_kernels.fewshot.evaluation.evaluation import Evaluation
from tir_kernels.fewshot.evaluation.figures import confusion_figure, reliability_figure
from tir_kernels.fewshot.run.folder import expanded_out, write_json, write_whole
from tir_kernels.text import printable

PAGE_NAME = "report.html"
_LARGEST_MATRIX = 2_000_000  # bytes of its figure in a page


def write_files(found: Evaluation, out: str | Path) -> Path:
    """Write all files of an evaluation; each is replaced as a whole.

    ``evaluation.json``, ``per_class.csv``, ``confusion.csv``, ``calibration.csv``,
    ``predictions.csv``, ``report.html``, and ``figures/`` with SVG and PNG.

    Args:
        found: The evaluation.
        out: The folder.

    Returns:
        The page.

    Raises:
        FewShotError: A file can't be written.
    """
    folder = expanded_out(out)
    drawings = {"confusion": confusion_figure(found), "reliability": reliability_figure(found)}
    write_figures(folder / "figures", drawings)
    write_json(folder / "evaluation.json", found.to_json())
    for name, table in {
        "per_class": tables.class_table(found),
        "confusion": tables.confusion_table(found),
        "calibration": tables.bin_table(found),
        "predictions": tables.prediction_table(found),
    }.items():
        write_whole(folder / f"{name}.csv", written(table, "csv").encode())
    # Markup by our own drawing, in which names are escaped.
    drawn = {name: Markup(drawing.panels[0]) for name, drawing in drawings.items()}
    if len(drawn["confusion"]) > _LARGEST_MATRIX:
        del drawn["confusion"]
    write_whole(folder / PAGE_NAME, _page(found, drawn).encode())
    return folder / PAGE_NAME


def _page(found: Evaluation, drawn: dict[str, Markup]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader("tir_kernels.fewshot.evaluation"),
                jinja2.PackageLoader("tir_kernels.analysis.page"),
            ]
        ),
        autoescape=True,  # class names are what users write
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    shown_tables: list[Table] = [
        tables.score_table(found),
        tables.class_table(found),
        tables.mistake_table(found),
    ]
    return environment.get_template("evaluation.html.j2").render(
        found=found, tables=shown_tables, drawn=drawn, shades=SHADES, shown=shown
    )
