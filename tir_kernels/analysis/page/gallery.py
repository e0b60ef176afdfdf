"""Pictures of an episode: its images, and under each arm what the image tower makes of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from tir_kernels.analysis.figures.styles import SCALE
from tir_kernels.analysis.page.tables import download
from tir_kernels.fewshot.run.maps import Maps

# From least to most; more of them can't be told apart, and would make the files larger.
COLOURS = tuple(
    f"#{bytes(colour[:3]).hex()}"
    for colour in matplotlib.colormaps["inferno"](range(12, 256, 5), bytes=True)
)
_SIDE = 160  # pixels of an image


class Tile(NamedTuple):
    """An overlay, one pixel a patch, to be enlarged by the browser.

    Attributes:
        title: Quantity that is shown.
        source: Its PNG as a ``data:`` address.
    """

    title: str
    source: str


class Picture(NamedTuple):
    """One image.

    Attributes:
        label: Words of its class.
        source: The image as a ``data:`` address.
        scales: Sentences that say what the darkest and the lightest colour stand for.
        rows: (arm, overlays).
    """

    label: str
    source: str
    scales: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Tile, ...]], ...]


class Gallery(NamedTuple):
    """The pictures of one episode.

    Attributes:
        episode: Its number.
        pictures: One for each image that is shown.
        count_colours: Colour of each number of classes, from 0.
    """

    episode: int
    pictures: tuple[Picture, ...]
    count_colours: tuple[str, ...]


def gallery(
    maps: Mapping[tuple[int, str], Maps], arms: Sequence[str], at_most: int
) -> Gallery | None:
    """The pictures of the first episode that most arms have maps of.

    Args:
        maps: Maps of a run by (episode, arm); those of the episode shown are read.
        arms: Its arms, in order.
        at_most: Images to show; of the classes in turn.

    Returns:
        ``None`` without maps.
    """
    counts = Counter(episode for episode, arm in maps if arm in arms)
    if not counts or at_most < 1:
        return None
    episode = max(counts, key=lambda number: (counts[number], -number))
    own = [maps[episode, arm] for arm in arms if (episode, arm) in maps]
    chosen = list(_in_turn(own[0].labels))[:at_most]
    colours = tuple(_count_colour(number, len(own[0].class_names)) for number in _counts(own[0]))
    return Gallery(episode, tuple(_picture(own, index) for index in chosen), colours)


def _in_turn(labels: np.ndarray) -> Iterator[int]:
    """Indices of images: the first of each class, then the second of each, and so on."""
    own = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for place in range(max(map(len, own), default=0)):
        for indices in own:
            if place < len(indices):
                yield int(indices[place])


def _counts(maps: Maps) -> range:
    return range(len(maps.class_names) + 1)


def _picture(own: Sequence[Maps], index: int) -> Picture:
    relevance = _range([each.relevance[index] for each in own])
    patches = own[0].weights.shape[1]
    received = [
        array[index].astype(np.float32) * array.shape[1]
        for each in own
        for array in (each.received_before, each.received_after)
    ]
    top = max(1.0, _range(received)[1])
    rows = []
    for number, each in enumerate(own):
        tiles = [
            Tile(f"relevance to {name}", _continuous(values, each.grid, relevance))
            for name, values in zip(each.class_names, each.relevance[index], strict=True)
        ]
        tiles.append(Tile("classes that pick it", _discrete(each, index)))
        for title, values in zip(
            ("attention before", "attention after"),
            received[2 * number : 2 * number + 2],
            strict=True,
        ):
            tiles.append(Tile(title, _continuous(values, each.grid, (0.0, top))))
        rows.append((each.arm, tuple(tiles)))
    first = own[0]
    return Picture(
        label=first.class_names[int(first.labels[index])],
        source=photo(first.images[index], _SIDE),
        scales=(
            f"Relevance: cosine from {relevance[0]:.3f} to {relevance[1]:.3f}.",
            # Not an even share, which prefix tokens have too.
            f"Attention received: from 0 to {top:.1f} times 1/{patches} of all, for {patches} "
            "patches.",
        ),
        rows=tuple(rows),
    )


def _range(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Smallest and largest finite value."""
    values = np.concatenate([array.astype(np.float32).ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _continuous(values: np.ndarray, grid: tuple[int, int], limits: tuple[float, float]) -> str:
    low, high = limits
    share = (values.astype(np.float32) - low) / (high - low if high > low else 1.0)
    top = len(COLOURS) - 1
    return _overlay(np.nan_to_num(share * top).round().clip(0, top), grid, COLOURS)


def _discrete(maps: Maps, index: int) -> str:
    colours = [_count_colour(count, len(maps.class_names)) for count in _counts(maps)]
    return _overlay(maps.counts[index], maps.grid, colours)


def _count_colour(count: int, classes: int) -> str:
    return SCALE[round(count * (len(SCALE) - 1) / max(classes, 1))].light


def _overlay(levels: np.ndarray, grid: tuple[int, int], colours: Sequence[str]) -> str:
    image = Image.fromarray(levels.reshape(grid).astype(np.uint8)).convert("P")
    image.putpalette(bytes.fromhex("".join(colour.lstrip("#") for colour in colours)))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return download(file.getvalue(), "image/png")


def photo(pixels: np.ndarray, side: int) -> str:
    """The ``data:`` address of an image (H, W, 3) uint8, of at most so many pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return download(file.getvalue(), "image/jpeg")
