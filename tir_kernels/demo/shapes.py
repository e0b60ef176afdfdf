"""The shapes of the source domain as signed distances: a ball, a star, a house, a cup."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tir_kernels.demo.canvas import Array

# A shape maps object coordinates (x right, y down, the object within [-1, 1]) to a signed
# distance, negative inside. Distances need not be exact: they only place and soften the edge.


def _disc(x: Array, y: Array, radius: float, cx: float = 0.0, cy: float = 0.0) -> Array:
    return np.hypot(x - cx, y - cy) - radius


def _rect(x: Array, y: Array, w: float, h: float, cx: float = 0.0, cy: float = 0.0) -> Array:
    return np.maximum(np.abs(x - cx) - w, np.abs(y - cy) - h)


def _wedge(x: Array, y: Array, tip: float, base: float, half_width: float) -> Array:
    """Triangle with its tip at (0, tip) and a level base at y = base, tip < base."""
    side = (np.abs(x) * (base - tip) - (y - tip) * half_width) / np.hypot(base - tip, half_width)
    return np.maximum(side, y - base)


def _star(x: Array, y: Array, tip: float, notch: float) -> Array:
    """Star of five points, the first at the top: radii of its tips and of the notches between."""
    turn = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    rise, run = notch * math.sin(turn), tip - notch * math.cos(turn)
    return ((along - tip) * rise + across * run) / math.hypot(rise, run)


def _petals(x: Array, y: Array, count: int, radius: float, far: float) -> Array:
    """Ring of discs of `radius` whose centres lie `far` from the middle."""
    turn = math.pi / count
    angle = np.abs((np.arctan2(x, -y) + turn) % (2 * turn) - turn)
    return np.hypot(np.hypot(x, y) * np.cos(angle) - far, np.hypot(x, y) * np.sin(angle)) - radius


def _union(*parts: Array) -> Array:
    return np.minimum.reduce(parts)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "ball": lambda x, y: _disc(x, y, 0.9),
    "box": lambda x, y: _rect(x, y, 0.8, 0.8),
    "triangle": lambda x, y: _wedge(x, y, -0.9, 0.8, 0.95),
    "star": lambda x, y: _star(x, y, 1.0, 0.42),
    "flower": lambda x, y: np.maximum(_petals(x, y, 6, 0.34, 0.6), -_disc(x, y, 0.25)),
    "heart": lambda x, y: _union(
        _disc(np.abs(x), y, 0.46, 0.42, -0.3), _wedge(x, -y, -0.9, 0.12, 0.87)
    ),
    "moon": lambda x, y: np.maximum(_disc(x, y, 0.9), -_disc(x, y, 0.75, 0.45, -0.1)),
    "ring": lambda x, y: np.abs(_disc(x, y, 0.66)) - 0.22,
    "cross": lambda x, y: _union(_rect(x, y, 0.9, 0.28), _rect(x, y, 0.28, 0.9)),
    "house": lambda x, y: np.maximum(
        _union(_rect(x, y, 0.65, 0.5, 0.0, 0.4), _wedge(x, y, -0.9, -0.05, 0.92)),
        -_rect(x, y, 0.15, 0.3, 0.0, 0.6),
    ),
    "tree": lambda x, y: _union(_wedge(x, y, -0.95, 0.45, 0.75), _rect(x, y, 0.15, 0.3, 0, 0.65)),
    "cup": lambda x, y: _union(_rect(x, y, 0.5, 0.65, -0.2), np.abs(_disc(x, y, 0.36, 0.4)) - 0.11),
    "fish": lambda x, y: _union(
        (np.hypot((x + 0.2) / 0.72, y / 0.45) - 1) * 0.45, _wedge(y, x, 0.2, 0.9, 0.55)
    ),
    "mushroom": lambda x, y: _union(
        np.maximum(_disc(x, y, 0.88), y), _rect(x, y, 0.22, 0.45, 0, 0.4)
    ),
    "boat": lambda x, y: _union(
        np.maximum(_disc(x, y, 0.9), 0.25 - y), _wedge(x, y, -0.95, 0.1, 0.5)
    ),
    "arrow": lambda x, y: _union(_rect(x, y, 0.5, 0.2, -0.4), _wedge(y, -x, -0.9, 0.0, 0.65)),
}
