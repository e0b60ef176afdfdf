"""A page of predictions: how many images of each class, and those that are most and least sure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tir_kernels.analysis.figures.styles import SCALE, SHADES
from tir_kernels.analysis.page.environment import environment
from tir_kernels.analysis.page.gallery import COLOURS, photo
from tir_kernels.analysis.page.tables import download
from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.folder import write_whole
from tir_kernels.files import MIB, read_bytes
from tir_kernels.text import setting

_MARK = b"<!doctype html>\n<!-- predictions, written by tir-finetune -->\n"
_SIDE = 200  # pixels of an image


class Seen(NamedTuple):
    """What the image tower makes of an image's N patches, in the block that is re-weighted last.

    Attributes:
        grid: Rows and columns of the patches.
        relevance: (N,) cosine with the likeliest class.
        counts: (N,) by how many classes each patch is picked.
        classes: Their number.
    """

    grid: tuple[int, int]
    relevance: np.ndarray
    counts: np.ndarray
    classes: int


class Predicted(NamedTuple):
    """An image with its likeliest classes.

    Attributes:
        name: The image's.
        pixels: (H, W, 3) uint8.
        classes: Labels with their probabilities, the likeliest first.
        seen: Of a re-weighted classifier.
    """

    name: str
    pixels: np.ndarray
    classes: Sequence[tuple[str, float]]
    seen: Seen | None = None


class Share(NamedTuple):
    """The images of a class: its label, their number, and the mean of their probability."""

    label: str
    images: int
    probability: float


def require_own_page(path: Path) -> None:
    """Refuse to replace a file that is no such page.

    Raises:
        FewShotError: It is none, or can't be read.
    """
    try:
        if not path.exists() and not path.is_symlink():
            return
        is_ours = read_bytes(path, at_most=64 * MIB).startswith(_MARK)
    except OSError as error:
        raise FewShotError(
            f"{setting('report')}: can't read {path}: {first_line(error)}"
        ) from error
    if not is_ours:
        raise FewShotError(
            f"{setting('report')}: {path} is not a page of predictions; move that file, or choose "
            f"another {setting('out')}"
        )


def write_predictions_page(
    path: Path,
    title: str,
    shares: Sequence[Share],
    most: Sequence[Predicted],
    least: Sequence[Predicted],
) -> None:
    """Write the page as one HTML file that loads nothing.

    Args:
        path: The file.
        title: Name of what was predicted.
        shares: The classes.
        most, least: Images whose first class has the highest and the lowest probability.

    Raises:
        FewShotError: It can't be written, or the file is no such page.
    """
    require_own_page(path)
    templates = environment(
        photo=lambda pixels: photo(pixels, _SIDE), relevance=_relevance, counts=_counts
    )
    text = templates.get_template("predictions.html.j2").render(
        title=title,
        shares=shares,
        total=sum(each.images for each in shares),
        groups=[("Most sure", most), ("Least sure", least)],
        shades=SHADES,
        map_colours=COLOURS,
    )
    write_whole(path, _MARK + text.encode())


def _relevance(seen: Seen) -> str:
    """The map from its least to its most, as an image of one pixel a patch."""
    low, high = float(seen.relevance.min()), float(seen.relevance.max())
    share = (seen.relevance - low) / (high - low if high > low else 1.0)
    return _tile(share * (len(COLOURS) - 1), seen.grid, COLOURS)


def _counts(seen: Seen) -> str:
    levels = seen.counts / max(seen.classes, 1) * (len(SCALE) - 1)
    return _tile(levels, seen.grid, [each.light for each in SCALE])


def _tile(levels: np.ndarray, grid: tuple[int, int], colours: Sequence[str]) -> str:
    image = Image.fromarray(levels.round().reshape(grid).astype(np.uint8)).convert("P")
    image.putpalette(bytes.fromhex("".join(colour.lstrip("#") for colour in colours)))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return download(file.getvalue(), "image/png")
