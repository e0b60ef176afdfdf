"""The captions of the source domain: one grammar that can state each attribute or leave it out."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from tir_kernels.demo.shapes import SHAPES

NUMBERS = ("one", "two", "three", "four", "five")
_POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
_PLACES = {
    "sky": "in the sky",
    "grass": "on grass",
    "sand": "on sand",
    "snow": "in the snow",
    "night": "at night",
    "brick": "on brick",
    "wood": "on wood",
    "water": "on water",
    "paper": "on paper",
}
# What a scene can be like, attribute by attribute. A medium size is never stated, and groups have
# neither a size nor a position.
CHOICES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": (
        "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
    ),
    "texture": ("plain", "striped", "spotted", "checkered", "wavy"),
    "number": NUMBERS,
    "position": tuple(_POSITIONS),
    "size": ("small", "large"),
    "background": tuple(_PLACES),
}  # fmt: skip
PHRASES = ("a photo of {}", "a picture of {}", "a drawing of {}", "{}")
_PLURALS = {"box": "boxes", "cross": "crosses", "fish": "fish"}


class Scene(NamedTuple):
    """The attributes of a drawing; "" where one does not apply, or a size that is medium."""

    shape: str
    colour: str
    texture: str
    number: str
    position: str
    size: str
    background: str


def describe(scene: Scene, stated: Collection[str] = Scene._fields) -> str:
    """Words for a scene, such as "a small striped red star on the left, on grass".

    Args:
        scene: Attributes that it has not are left out.
        stated: Names of the attributes to speak of. Naming a shape takes its number too.
    """
    known = {name: word for name, word in scene._asdict().items() if name in stated}
    qualities = [known.get(name, "") for name in ("size", "texture", "colour")]
    if not {"shape", "number"} & set(stated):
        words = ["something", *qualities]
    elif scene.number == "one":
        words = [*qualities, known.get("shape", "thing")]
        first = next(word for word in words if word)
        words.insert(0, "an" if first[0] in "aeiou" else "a")
    else:
        shape = known.get("shape", "thing")
        words = [scene.number, *qualities, _PLURALS.get(shape, shape + "s")]
    position = _POSITIONS.get(known.get("position", ""), "")
    place = _PLACES.get(known.get("background", ""), "")
    if position and place:
        position += ","
    return " ".join(word for word in (*words, position, place) if word)
