"""The source domain: clean, everyday compositions, each with an English caption.

A red ball on grass, three yellow stars, a cup left of a striped fish: shapes, colours, textures,
counts, places and backgrounds combine freely, so that a model has to learn each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def _petals(x: Array, y: Array, count: int, mean: float, depth: float) -> Array:
    return np.hypot(x, y) - mean - depth * np.cos(count * np.arctan2(x, -y))


def _union(*parts: Array) -> Array:
    return np.minimum.reduce(parts)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "ball": lambda x, y: _disc(x, y, 0.9),
    "box": lambda x, y: _rect(x, y, 0.8, 0.8),
    "triangle": lambda x, y: _wedge(x, y, -0.9, 0.8, 0.95),
    "star": lambda x, y: _petals(x, y, 5, 0.6, 0.32),
    "flower": lambda x, y: np.maximum(_petals(x, y, 7, 0.72, 0.16), -_disc(x, y, 0.28)),
    "heart": lambda x, y: _union(
        _disc(np.abs(x), y, 0.46, 0.42, -0.3), _wedge(x, -y, -0.9, 0.12, 0.87)
    ),
    "moon": lambda x, y: np.maximum(_disc(x, y, 0.9), -_disc(x, y, 0.75, 0.45, -0.1)),
    "ring": lambda x, y: np.abs(_disc(x, y, 0.66)) - 0.22,
    "cross": lambda x, y: _union(_rect(x, y, 0.9, 0.28), _rect(x, y, 0.28, 0.9)),
    "diamond": lambda x, y: (np.abs(x) * 1.4 + np.abs(y) - 0.95) * 0.6,
    "house": lambda x, y: np.maximum(
        _union(_rect(x, y, 0.65, 0.5, 0.0, 0.4), _wedge(x, y, -0.9, -0.05, 0.92)),
        -_rect(x, y, 0.15, 0.3, 0.0, 0.6),
    ),
    "tree": lambda x, y: _union(_wedge(x, y, -0.95, 0.45, 0.75), _rect(x, y, 0.15, 0.3, 0, 0.65)),
    "cup": lambda x, y: _union(_rect(x, y, 0.5, 0.65, -0.2), np.abs(_disc(x, y, 0.36, 0.4)) - 0.11),
    "fish": lambda x, y: _union(
        (np.hypot((x + 0.2) / 0.72, y / 0.45) - 1) * 0.45, _wedge(y, x, 0.2, 0.9, 0.55)
    ),
    "arrow": lambda x, y: _union(_rect(x, y, 0.5, 0.2, -0.4), _wedge(y, -x, -0.9, 0.0, 0.65)),
    "cloud": lambda x, y: np.maximum(
        _union(_disc(x, y, 0.5, 0, -0.1), _disc(np.abs(x), y, 0.38, 0.52, 0.15)), y - 0.4
    ),
    "mushroom": lambda x, y: _union(
        np.maximum(_disc(x, y, 0.88), y), _rect(x, y, 0.22, 0.45, 0, 0.4)
    ),
    "key": lambda x, y: _union(
        np.abs(_disc(x, y, 0.3, -0.55)) - 0.12,
        _rect(x, y, 0.6, 0.1, 0.3),
        _rect(x, y, 0.09, 0.3, 0.75, 0.2),
        _rect(x, y, 0.09, 0.24, 0.4, 0.2),
    ),
    "bottle": lambda x, y: _union(
        _rect(x, y, 0.4, 0.55, 0, 0.38), _rect(x, y, 0.14, 0.45, 0, -0.45)
    ),
    "leaf": lambda x, y: np.maximum(_disc(x, y, 1.15, 0.7), _disc(x, y, 1.15, -0.7)),
    "boat": lambda x, y: _union(
        np.maximum(_disc(x, y, 0.9), 0.25 - y), _wedge(x, y, -0.95, 0.1, 0.5)
    ),
    "lamp": lambda x, y: _union(
        np.maximum(_wedge(x, y, -1.6, 0.05, 0.8), -0.75 - y),
        _rect(x, y, 0.09, 0.5, 0, 0.4),
        _rect(x, y, 0.45, 0.1, 0, 0.85),
    ),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (245, 215, 60),
    "green": (50, 160, 70), "blue": (45, 90, 205), "purple": (130, 60, 170),
    "pink": (245, 145, 185), "brown": (125, 80, 45), "black": (25, 25, 30),
    "white": (246, 246, 242), "grey": (135, 138, 142),
}  # fmt: skip

# Object-space patterns in [0, 1]: how far the object's colour gives way to its second tone.
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "striped": lambda x, y: np.clip(0.5 + 2 * np.sin(9.0 * x), 0, 1),
    "spotted": lambda x, y: np.clip(0.4 - 4 * (0.5 - np.sin(7 * x) * np.sin(7 * y)), 0, 1),
    "checkered": lambda x, y: np.clip(0.5 + 3 * np.sin(7 * x) * np.sin(7 * y), 0, 1),
    "wavy": lambda x, y: np.clip(0.5 + 2 * np.sin(9 * y + 2 * np.sin(6 * x)), 0, 1),
}


def _bricks(rng: np.random.Generator) -> Array:
    shift = rng.integers(0, 12)
    course = (ROWS + shift) // 6
    joint = ((ROWS + shift) % 6 < 1) | ((COLUMNS + 6 * (course % 2) + shift) % 12 < 1)
    return np.where(joint, 1.0, -0.4 + 0.2 * np.sin(course * 5.0 + (COLUMNS + shift) // 12))


# Background: base colour, and a pattern of about unit size that lightens or darkens it.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], Callable[[np.random.Generator], Array]]] = {
    "sky": ((150, 200, 240), lambda rng: ROWS / 32 - 1),
    "grass": ((95, 165, 75), lambda rng: 0.8 * smooth_noise(rng, 1.0)),
    "sand": ((222, 200, 150), lambda rng: 0.4 * smooth_noise(rng, 2.0)),
    "snow": ((236, 240, 246), lambda rng: 0.3 * smooth_noise(rng, 10.0)),
    "night": ((28, 30, 62), lambda rng: 4.0 * (rng.random(ROWS.shape) > 0.992)),
    "brick": ((170, 90, 70), _bricks),
    "wood": ((176, 130, 84), lambda rng: np.sin(COLUMNS * 0.7 + smooth_noise(rng, 12.0))),
    "water": ((60, 130, 180), lambda rng: np.sin(ROWS * 0.8 + 2 * np.sin(COLUMNS / 7))),
    "paper": ((232, 226, 210), lambda rng: np.zeros_like(ROWS)),
}

COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
_PHRASES = ("a photo of {}", "a picture of {}", "an image of {}", "{}", "a drawing of {}", "{}")


@dataclass(frozen=True)
class SourceDrawing:
    """A source image, (64, 64, 3) uint8, its caption, and the name of its first object's shape."""

    pixels: Pixels
    caption: str
    shape: str


def _paint_object(
    image: Array, rng: np.random.Generator, shape: str, colour: str, texture: str,
    centre: Array, radius: float,
) -> None:  # fmt: skip
    """Draw one object into `image`, (64, 64, 3), in place; centre (x, y) and radius in pixels."""
    cx, cy = float(centre[0]), float(centre[1])  # Python floats keep the arithmetic in float32
    angle = rng.normal(0, 0.15)
    cosine, sine = math.cos(angle), math.sin(angle)
    # No shape reaches further than 1.5 radii, so only that window is computed.
    top, left = max(0, int(cy - 1.5 * radius)), max(0, int(cx - 1.5 * radius))
    window = np.s_[top : int(cy + 1.5 * radius) + 1, left : int(cx + 1.5 * radius) + 1]
    dx, dy = (COLUMNS[window] - cx) / radius, (ROWS[window] - cy) / radius
    x, y = cosine * dx + sine * dy, cosine * dy - sine * dx
    alpha = np.clip(0.5 - SHAPES[shape](x, y) * radius, 0, 1)[..., None]
    tone = (np.array(COLOURS[colour]) + rng.normal(0, 9, 3)).astype(np.float32)
    # The second tone moves towards white for dark colours and towards black for light ones.
    second = tone + (120 if tone.mean() < 128 else -110)
    pattern = TEXTURES[texture](x, y)[..., None] if texture else 0.0
    shading = -14 * (x + y)[..., None].clip(-2, 2)
    view = image[window]
    view += alpha * (tone + (second - tone) * pattern + shading - view)


def _noun(
    rng: np.random.Generator, shape: str, colour: str, texture: str, size: str = "", count: int = 1
) -> str:
    """Name an object; each attribute is left out now and then, as people do."""
    words = [w for w in (size, colour, texture) if w and rng.random() < 0.75]
    noun = " ".join([*words, shape])
    if count > 1:
        plural = {"leaf": "leaves", "box": "boxes", "cross": "crosses", "fish": "fish"}
        return " ".join([COUNT_WORDS[count], *words, plural.get(shape, shape + "s")])
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.integers(len(names))]


def draw_source(
    index: int, *, seed: int = 0, stream: int = 0, single: bool = False
) -> SourceDrawing:
    """Draw image `index` of the source domain.

    Images with another `seed` or `stream` are independent draws: training takes stream 0,
    held-out evaluation stream 1. `single` asks for one object, as classification by shape needs;
    otherwise there are one object, two to five alike, or two different ones side by side.
    """
    rng = np.random.default_rng([seed, stream, index])
    background = _pick(rng, tuple(BACKGROUNDS))
    base, pattern = BACKGROUNDS[background]
    tint = (np.array(base) + rng.normal(0, 6, 3)).astype(np.float32)
    image = tint + rng.uniform(8, 18) * pattern(rng)[..., None]

    shapes, colours = tuple(SHAPES), tuple(COLOURS)
    shape, colour = _pick(rng, shapes), _pick(rng, colours)
    texture = _pick(rng, tuple(TEXTURES)) if rng.random() < 0.4 else ""
    layout = 0.0 if single else rng.random()
    if layout < 0.5:
        radius = rng.uniform(9, 27)
        centre = rng.uniform(radius * 0.8, IMAGE_SIZE - radius * 0.8, 2)
        size = "small" if radius < 14 else "large" if radius > 22 else ""
        _paint_object(image, rng, shape, colour, texture, centre, radius)
        what = _noun(rng, shape, colour, texture, size)
        if abs(centre[0] - 32) > 12 and rng.random() < 0.4:
            what += " on the left" if centre[0] < 32 else " on the right"
    elif layout < 0.75:
        count = int(rng.integers(2, 6))
        for cell in rng.permutation(9)[:count]:
            centre = np.array([cell % 3, cell // 3]) * 21 + rng.uniform(9, 13, 2)
            _paint_object(image, rng, shape, colour, texture, centre, rng.uniform(8, 10.5))
        what = _noun(rng, shape, colour, texture, count=count)
    else:
        other, other_colour = _pick(rng, shapes), _pick(rng, colours)
        across = rng.random() < 0.5
        first, second = rng.uniform(12, 20, 2), rng.uniform([44, 28], [52, 36])
        first[1] = rng.uniform(28, 36)
        if not across:
            first, second = first[::-1], second[::-1]
        _paint_object(image, rng, shape, colour, texture, first, rng.uniform(11, 15))
        _paint_object(image, rng, other, other_colour, "", second, rng.uniform(11, 15))
        relation = _pick(rng, ("left of", "next to") if across else ("above", "over"))
        what = f"{_noun(rng, shape, colour, texture)} {relation} "
        what += _noun(rng, other, other_colour, "")
    if rng.random() < 0.5:
        what += f" on {background}" if rng.random() < 0.6 else f" with a {background} background"
    caption = _pick(rng, _PHRASES).format(what)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    return SourceDrawing(to_pixels(image + 2 * grain), caption, shape)
