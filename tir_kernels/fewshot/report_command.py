"""The command ``report``, and the page that a finished run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.interrupts import leaving_at_once
from tir_kernels.fewshot.options import NAME, with_options
from tir_kernels.text import Notice, printable, setting

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE_NAME = "report.html"
FORMATS = ("text", "csv", "markdown", "latex")


@click.command()
@click.argument("run_dirs", type=NAME, nargs=-1, required=True, metavar="RUN_DIR...")
@click.option(
    "--out",
    type=NAME,
    metavar="FILE",
    help=f"HTML file to write, with its figures in a folder beside it; by default {PAGE_NAME}, in "
    "the run's folder if there is one run, else in the current one.",
)
@click.option(
    "--baseline",
    metavar="ARM",
    help="The arm that others are compared with; by default the first of LoRA's arms, else of the "
    "linear probe's, else the first of all.",
)
@click.option(
    "--format",
    "style",
    type=click.Choice(FORMATS),
    help="Print the tables in this format, text being for the terminal, and write no page.",
)
def report(run_dirs: tuple[str, ...], out: str | None, baseline: str | None, style: str | None):
    """Write a page to look at: accuracy, measures through training, and pictures.

    Several runs, as in report runs/*, stand side by side: arms against data sets, a table for each
    number of shots. Below stands what papers report on the same data sets, marked as quoted.
    """
    if style is not None and out is not None:
        raise FewShotError(
            f"{setting('out')} is for the page; to keep tables, send what "
            f"{setting('format', style)} prints to a file"
        )
    with leaving_at_once():
        from tir_kernels.analysis.page import tables_text, write_page
    if style is not None:
        click.echo(tables_text(run_dirs, style, baseline=baseline), nl=False)
        return
    folder = Path(run_dirs[0]) if len(run_dirs) == 1 else Path()
    path = write_page(run_dirs, folder / PAGE_NAME if out is None else out, baseline=baseline)
    click.echo(printable(str(path)))


def show_page(folders: Sequence[str | Path], out: str | Path) -> None:
    """Write the page of finished runs, and print a line that names it or says why there is none.

    Nothing that goes wrong in drawing is worth a finished run.

    Args:
        folders: Folders of the runs.
        out: Folder for the page.
    """
    try:
        from tir_kernels.analysis.page import write_page
        from tir_kernels.fewshot.run.folder import expanded_out

        line = f"Page: {printable(str(write_page(folders, expanded_out(out) / PAGE_NAME)))}"
    except FewShotError as error:
        line = f"No page: {with_options(error.notice)}"
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        line = f"No page: {with_options(Notice(reason))}"
    click.echo(line)
