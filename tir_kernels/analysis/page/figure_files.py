"""The figures of a page, as files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tir_kernels.analysis.figures.drawing import Drawing
from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.folder import write_whole
from tir_kernels.text import setting


def write_figures(folder: Path, drawings: Mapping[str, Drawing]) -> None:
    """Write figures as SVG and PNG, into a folder that is made if need be.

    Args:
        folder: The folder.
        drawings: Name of the files without ending -> figure.

    Raises:
        FewShotError: The folder can't be made, or a file can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FewShotError(f"{setting('out')}: can't make {folder}: {first_line(error)}") from error
    for name, drawing in drawings.items():
        write_whole(folder / f"{name}.svg", drawing.svg)
        write_whole(folder / f"{name}.png", drawing.png)
