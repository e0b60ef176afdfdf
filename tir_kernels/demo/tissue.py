"""The target domain: stained tissue under a microscope, as far from the source domain as can be.

Two stains on a pale ground, low contrast, speckle, no objects and no background. A class is a
local structure (bubbles of fat, rings of glands, crowded nuclei). It fills most of each image,
the rest shows another class's structure, and several structures share their parts (nuclei,
fibres), so that images are partly ambiguous, as real ones are. The tissue is invented: it stands
for no medical data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tir_kernels.demo.canvas import (
    COLUMNS,
    IMAGE_SIZE,
    ROWS,
    Array,
    Pixels,
    smooth_noise,
    to_pixels,
)

# Optical density of each stain in red, green and blue (haematoxylin and eosin, after Ruifrok and
# Johnston, "Quantification of histochemical staining by color deconvolution", 2001).
_NUCLEAR_STAIN = np.array([0.65, 0.70, 0.29])
_TISSUE_STAIN = np.array([0.07, 0.99, 0.11])

# How much of each stain a structure takes up: (nuclear, tissue), each (64, 64), about 0..1.
Stains = tuple[Array, Array]


def _grid(rng: np.random.Generator, spacing: float, jitter: float) -> Array:
    """Points (n, 2) as (x, y), roughly evenly spread over the image and a margin around it."""
    steps = np.arange(-spacing / 2, IMAGE_SIZE + spacing, spacing)
    points = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    points += rng.uniform(0, spacing, 2) + rng.normal(0, jitter * spacing, points.shape)
    return points.astype(np.float32)


def _nuclei(
    points: Array, radius: Array | float, angle: Array | float = 0.0, stretch: Array | float = 1.0
) -> Array:
    """Soft ellipses (64, 64) in 0..1 at `points` (n, 2); the other arguments: one or n values."""
    radius, angle, stretch = (
        np.broadcast_to(np.asarray(value, np.float32), len(points))[:, None, None]
        for value in (radius, angle, stretch)
    )
    # Each ellipse is computed in a small window of its own; windows may reach into the margin.
    margin = math.ceil(float((radius * np.maximum(stretch, 1)).max(initial=0.0))) + 2
    window = np.arange(-margin, margin + 1)
    centre = np.clip(np.rint(points), -margin, IMAGE_SIZE + margin).astype(np.int64)
    columns, rows = centre[:, 0, None, None] + window, centre[:, 1, None, None] + window[:, None]
    dx, dy = columns - points[:, 0, None, None], rows - points[:, 1, None, None]
    along = (np.cos(angle) * dx + np.sin(angle) * dy) / stretch
    across = np.cos(angle) * dy - np.sin(angle) * dx
    cover = np.clip(0.5 + radius - np.hypot(along, across), 0, 1).astype(np.float32)
    canvas = np.zeros((IMAGE_SIZE + 4 * margin + 1,) * 2, np.float32)
    np.maximum.at(canvas, (rows + 2 * margin, columns + 2 * margin), cover)
    return canvas[2 * margin :, 2 * margin :][:IMAGE_SIZE, :IMAGE_SIZE]


def _fibres(rng: np.random.Generator, width: float, waviness: float) -> tuple[Array, float]:
    """Parallel wavy bands (64, 64) in -1..1, and their direction in radians."""
    angle = rng.uniform(0, math.pi)
    across = math.cos(angle) * ROWS - math.sin(angle) * COLUMNS
    return np.sin(2 * math.pi * (across + waviness * smooth_noise(rng, 10)) / width), angle


def _fat(rng: np.random.Generator) -> Stains:
    points = _grid(rng, rng.uniform(11, 16), 0.22)
    distance = np.hypot(COLUMNS[..., None] - points[:, 0], ROWS[..., None] - points[:, 1])
    nearest, second = np.partition(distance, 1, axis=-1)[..., :2].transpose(2, 0, 1)
    wall = np.clip(2.4 - (second - nearest), 0, 1)
    return 0.5 * wall * (smooth_noise(rng, 3) > 1.2), 0.6 * wall


def _lymph(rng: np.random.Generator) -> Stains:
    points = _grid(rng, rng.uniform(4.6, 6), 0.2)
    points = points[rng.random(len(points)) < 0.85]
    return _nuclei(points, rng.uniform(1.5, 2.0)), np.full_like(ROWS, 0.2)


def _muscle(rng: np.random.Generator) -> Stains:
    bands, angle = _fibres(rng, rng.uniform(6, 9), 1.2)
    points = _grid(rng, 16, 0.3)
    return 0.8 * _nuclei(points, 1.1, angle, 3.5), 0.62 + 0.2 * bands


def _stroma(rng: np.random.Generator) -> Stains:
    bands, angle = _fibres(rng, rng.uniform(7, 12), 4.5)
    points = _grid(rng, 14, 0.35)
    angles = angle + rng.normal(0, 0.5, len(points))
    return 0.8 * _nuclei(points, 1.2, angles, 2.6), 0.42 + 0.2 * bands


def _gland(rng: np.random.Generator) -> Stains:
    nuclear, tissue = np.zeros_like(ROWS), 0.35 + 0.08 * smooth_noise(rng, 4)
    for cx, cy in _grid(rng, 30, 0.12):
        radius = rng.uniform(7, 12)
        turn = np.arange(0, 2 * math.pi, 3.6 / radius) + rng.normal(0, 0.06)
        rim = radius * rng.normal(1, 0.06, len(turn))
        points = np.stack([cx + rim * np.cos(turn), cy + rim * np.sin(turn)], axis=-1)
        nuclear = np.maximum(nuclear, _nuclei(points, 1.4, turn, 1.5))
        lumen = np.clip(radius * 0.55 - np.hypot(COLUMNS - cx, ROWS - cy), 0, 1)
        tissue = tissue * (1 - 0.9 * lumen)
    return 0.9 * nuclear, tissue


def _tumor(rng: np.random.Generator) -> Stains:
    points = _grid(rng, rng.uniform(7, 9), 0.2)
    radius = rng.uniform(1.8, 3.8, len(points))
    angles, stretch = rng.uniform(0, math.pi, len(points)), rng.uniform(1, 1.5, len(points))
    chromatin = 0.75 + 0.15 * smooth_noise(rng, 1.5)
    return chromatin * _nuclei(points, radius, angles, stretch), np.full_like(ROWS, 0.35)


def _dividing(rng: np.random.Generator) -> Stains:
    points = _grid(rng, rng.uniform(8, 10), 0.16)
    split = rng.random(len(points)) < 0.45
    whole = 0.6 * _nuclei(points[~split], rng.uniform(2.2, 3.0))
    angles = rng.uniform(0, math.pi, int(split.sum()))
    apart = 1.9 * np.stack([-np.sin(angles), np.cos(angles)], axis=-1)
    bars = [_nuclei(points[split] + side * apart, 0.9, angles, 2.6) for side in (-1, 1)]
    return np.maximum(whole, np.maximum(*bars)), np.full_like(ROWS, 0.32)


def _debris(rng: np.random.Generator) -> Stains:
    grains = np.clip(smooth_noise(rng, 1.3), 0, 2)
    patches = np.clip(0.5 + smooth_noise(rng, 5), 0, 1.2)
    return 0.3 * grains * patches, 0.25 + 0.3 * np.clip(smooth_noise(rng, 1.3), 0, 2)


def _mucus(rng: np.random.Generator) -> Stains:
    wisps = np.exp(-4 * np.abs(smooth_noise(rng, 6)))
    points = _grid(rng, 26, 0.4)
    return 0.12 + 0.22 * wisps + 0.5 * _nuclei(points, 1.6), 0.05 + 0.1 * wisps


def _vessel(rng: np.random.Generator) -> Stains:
    nuclear, tissue = _stroma(rng)
    blood = _nuclei(_grid(rng, 5, 0.25), 1.7)
    for cx, cy in _grid(rng, 34, 0.15):
        radius, angle = rng.uniform(8, 13), rng.uniform(0, math.pi)
        dx, dy = COLUMNS - cx, ROWS - cy
        along = (math.cos(angle) * dx + math.sin(angle) * dy) / rng.uniform(1.0, 1.4)
        distance = np.hypot(along, math.cos(angle) * dy - math.sin(angle) * dx)
        inside = np.clip(radius - distance, 0, 1)
        wall = np.clip(1.6 - np.abs(distance - radius), 0, 1)
        tissue = tissue * (1 - inside) + inside * 0.7 * blood
        tissue = np.maximum(tissue, 0.75 * wall)
        nuclear = nuclear * (1 - inside)
    return nuclear, tissue


# Folder name -> (words for the class, painter). The folders are abbreviations, as in many real
# data sets; a few of the words ("small", "ring", "wavy") occur in source captions, with another
# meaning, and most do not.
CLASSES: dict[str, tuple[str, Callable[[np.random.Generator], Stains]]] = {
    "ADI": ("fat bubbles", _fat),
    "DEB": ("dead cell debris", _debris),
    "DIV": ("dividing cells", _dividing),
    "GLA": ("gland rings", _gland),
    "LYM": ("small round lymph cells", _lymph),
    "MUC": ("mucus clouds", _mucus),
    "MUS": ("smooth muscle", _muscle),
    "STR": ("loose wavy fibres", _stroma),
    "TUM": ("tumor tissue", _tumor),
    "VES": ("blood vessels", _vessel),
}


def draw_tissue(folder: str, index: int, *, seed: int = 0) -> Pixels:
    """Draw image `index` of the class whose folder is named `folder`: (64, 64, 3) uint8."""
    names = list(CLASSES)
    rng = np.random.default_rng([seed, names.index(folder), index])
    other = names[rng.integers(len(names))]
    nuclear, tissue = CLASSES[folder][1](rng)
    other_nuclear, other_tissue = CLASSES[other][1](rng)
    # A smooth border divides the image; the class's own share is 79 % on average, mostly 65 to 90.
    own = 1 / (1 + np.exp(-5 * (smooth_noise(rng, 11) + rng.uniform(0.3, 1.5))))
    nuclear = own * nuclear + (1 - own) * other_nuclear
    tissue = own * tissue + (1 - own) * other_tissue

    gains = rng.uniform(0.65, 0.9), rng.uniform(0.5, 0.7)
    hues = [stain + rng.normal(0, 0.03, 3) for stain in (_NUCLEAR_STAIN, _TISSUE_STAIN)]
    density = gains[0] * nuclear[..., None] * hues[0] + gains[1] * tissue[..., None] * hues[1]
    light = rng.uniform(215, 240) * (1 + 0.05 * smooth_noise(rng, 14))[..., None]
    speckle = 1 + 0.05 * rng.standard_normal(density.shape)
    return to_pixels(light * np.exp(-density) * speckle)
