"""The source domain: clean, everyday compositions, each with an English caption.

A red ball on grass, three spotted stars at night, a small blue cup on the left: shapes, colours,
textures, numbers, positions, sizes and backgrounds combine freely, so that a model has to learn
each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tir_kernels.demo.canvas import COLUMNS, ROWS, Array, Pixels, smooth_noise, to_pixels
from tir_kernels.demo.captions import CHOICES, NUMBERS, Scene, describe
from tir_kernels.demo.shapes import SHAPES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (245, 215, 60),
    "green": (50, 160, 70), "blue": (45, 90, 205), "purple": (130, 60, 170),
    "pink": (245, 145, 185), "brown": (125, 80, 45), "black": (25, 25, 30),
    "white": (246, 246, 242),
}  # fmt: skip

# Patterns in [0, 1] of the pixels right of and below an object's centre: how far the object's
# colour gives way to its second tone. All repeat within 7 to 12 pixels.
_TURN = 2 * math.pi
TEXTURES: dict[str, Callable[[Array, Array], Array]] = {
    "plain": lambda x, y: np.zeros_like(x),
    "striped": lambda x, y: np.clip(0.5 + 2.5 * np.sin(_TURN * x / 7), 0, 1),
    "spotted": lambda x, y: np.clip(
        4.5 * (np.cos(_TURN * x / 7) + np.cos(_TURN * y / 7) - 0.7), 0, 1
    ),
    "checkered": lambda x, y: np.clip(
        0.5 + 3 * np.sin(_TURN * x / 10) * np.sin(_TURN * y / 10), 0, 1
    ),
    "wavy": lambda x, y: np.clip(
        0.5 + 2.5 * np.sin(_TURN * (y + 2 * np.sin(_TURN * x / 12)) / 7), 0, 1
    ),
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

_OFFSETS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}


@dataclass(frozen=True)
class SourceDrawing:
    """A source image, the scene it shows, and where its objects are.

    Attributes:
        pixels: (64, 64, 3) uint8.
        scene: What can be seen.
        cover: (64, 64) bool, true on the objects.
    """

    pixels: Pixels
    scene: Scene
    cover: NDArray[np.bool_]

    @property
    def caption(self) -> str:
        """Words for all attributes of the scene."""
        return describe(self.scene)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[rng.integers(len(names))]


def _random_scene(rng: np.random.Generator, number: str) -> Scene:
    """A scene with `number` objects; single ones have a position, and a size if not medium."""
    words = {name: _pick(rng, CHOICES[name]) for name in Scene._fields}
    size = ("small", "large", "", "")[rng.integers(4)]
    position = "middle" if size == "large" else words["position"]
    if number != "one":
        size = position = ""
    return Scene(**{**words, "number": number, "position": position, "size": size})


def _places(rng: np.random.Generator, scene: Scene) -> list[tuple[float, float, float]]:
    """Where the objects of a scene lie: centre (x, y) and radius of each, in pixels."""
    if scene.number != "one":
        cells = rng.permutation(9)[: 1 + NUMBERS.index(scene.number)]
        shifts, radius = rng.uniform(-1.2, 1.2, (len(cells), 2)), rng.uniform(8.5, 9.6)
        return [
            (11.5 + 20.5 * (cell % 3) + dx, 11.5 + 20.5 * (cell // 3) + dy, radius)
            for cell, (dx, dy) in zip(cells, shifts, strict=True)
        ]
    far, least, most = {"small": (19, 9, 10.5), "large": (0, 21, 25)}.get(scene.size, (14, 13, 16))
    right, down = _OFFSETS[scene.position]
    shift = rng.uniform(-2.5, 2.5, 2)
    return [(31.5 + far * right + shift[0], 31.5 + far * down + shift[1], rng.uniform(least, most))]


def _paint_object(
    image: Array,
    cover: NDArray[np.bool_],
    rng: np.random.Generator,
    scene: Scene,
    place: tuple[float, float, float],
) -> None:
    """Draw an object into `image`, (64, 64, 3), and its pixels into `cover`, (64, 64), in place."""
    cx, cy, radius = map(float, place)  # Python floats keep the arithmetic in float32
    angle = rng.normal(0, 0.1)
    cosine, sine = math.cos(angle), math.sin(angle)
    # No shape reaches further than 1.5 radii, so only that window is computed.
    top, left = max(0, int(cy - 1.5 * radius)), max(0, int(cx - 1.5 * radius))
    window = np.s_[top : int(cy + 1.5 * radius) + 2, left : int(cx + 1.5 * radius) + 2]
    dx, dy = COLUMNS[window] - cx, ROWS[window] - cy
    x, y = cosine * dx + sine * dy, cosine * dy - sine * dx
    distance = SHAPES[scene.shape](x / radius, y / radius) * radius
    tone = (np.array(COLOURS[scene.colour]) + rng.normal(0, 7, 3)).astype(np.float32)
    # The second tone moves towards white for dark colours and towards black for light ones.
    second = tone + (120 if tone.mean() < 128 else -110)
    shading = -8 * np.clip((x + y) / radius, -2, 2)[..., None]
    view = image[window]
    view += np.clip(0.5 - distance, 0, 1)[..., None] * (
        tone + (second - tone) * TEXTURES[scene.texture](x, y)[..., None] + shading - view
    )
    # A thin outline, dark on light ground and light on dark, sets every colour off its background.
    outline = 30.0 if sum(BACKGROUNDS[scene.background][0]) > 450 else 245.0
    view += np.clip(1.1 - np.abs(distance - 0.3), 0, 0.8)[..., None] * (outline - view)
    cover[window] |= distance < 0


def draw_source(
    index: int, *, seed: int = 0, stream: int = 0, group: bool | None = None
) -> SourceDrawing:
    """Draw image `index` of the source domain.

    Args:
        index: At least 0.
        seed: At least 0; another seed gives independent drawings.
        stream: Another stream, too: training takes 0, held-out evaluation 1.
        group: False for a single object, True for two to five alike; by default either.
    """
    rng = np.random.default_rng([seed, stream, index])
    is_group = rng.random() < 0.4 if group is None else group
    scene = _random_scene(rng, _pick(rng, NUMBERS[1:]) if is_group else NUMBERS[0])
    base, pattern = BACKGROUNDS[scene.background]
    tint = (np.array(base) + rng.normal(0, 6, 3)).astype(np.float32)
    image = (tint + rng.uniform(7, 14) * pattern(rng)[..., None]).astype(np.float32)
    cover = np.zeros(ROWS.shape, dtype=bool)
    for place in _places(rng, scene):
        _paint_object(image, cover, rng, scene, place)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    return SourceDrawing(to_pixels(image + 2 * grain), scene, cover)
