"""Colours and dashes of lines, told apart by all readers, on light, dark and printed pages."""

from __future__ import annotations

from typing import Any, NamedTuple

from tir_kernels.analysis.figures.panels import INK


class Shade(NamedTuple):
    """A colour of figures.

    Attributes:
        name: The page's CSS custom property for it, without dashes in front.
        light, dark: ``#rrggbb`` on a light and on a dark page.
    """

    name: str
    light: str
    dark: str


def _shades(name: str, *colours: tuple[str, str]) -> tuple[Shade, ...]:
    return tuple(Shade(f"{name}-{place}", *pair) for place, pair in enumerate(colours))


# After Okabe and Ito, darkened or lightened until lines stand out from the page.
ARMS = _shades(
    "line",
    ("#0072b2", "#56b4e9"), ("#d55e00", "#ff8a3d"), ("#008a65", "#2fd3a2"),
    ("#b5568f", "#e79ac6"), ("#b07a00", "#f0c419"), ("#3f3d9e", "#a3a1ff"),
)  # fmt: skip
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))

# From few to many, with equal steps of lightness.
SCALE = _shades(
    "scale",
    ("#7fb3d5", "#3f6f94"), ("#3f86b8", "#5f9fce"), ("#0b5a8c", "#9cd0f5"),
    ("#c98a2b", "#a8742a"), ("#c25714", "#e08a3c"), ("#8a2a0a", "#ffc08a"),
)  # fmt: skip

TEXT = Shade("ink", "#1c1b22", "#ecebf2")
MUTED = Shade("muted", "#63616d", "#a9a7b5")
GRID = Shade("grid", "#dddce3", "#3a3945")

SHADES = (*ARMS, *SCALE, TEXT, MUTED, GRID)


def shade(style: int, total: int, is_ordered: bool) -> Shade:
    """The colour of a line.

    Args:
        style: Its number, or ``INK``.
        total: Number of lines on a scale.
        is_ordered: Whether it is on a scale.
    """
    if style == INK:
        return TEXT
    if is_ordered:
        return SCALE[round(style * (len(SCALE) - 1) / max(total - 1, 1))]
    return ARMS[style % len(ARMS)]


def dashes(style: int, is_ordered: bool) -> Any:
    """Matplotlib's line style: neighbours differ in it, and so do lines of one colour."""
    if style == INK:
        return (0, (1, 1.5))
    if is_ordered:
        return "solid"
    return _DASHES[(style + style // len(ARMS)) % len(_DASHES)]
