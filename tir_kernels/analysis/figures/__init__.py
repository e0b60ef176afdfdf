"""Figures of measures: small panels, as SVG that takes its colours from a page, and as PNG."""

from tir_kernels.analysis.figures.drawing import Drawing, draw
from tir_kernels.analysis.figures.panels import INK, Chart, Dots, Line, Lines, Point, Ranks

__all__ = ["INK", "Chart", "Dots", "Drawing", "Line", "Lines", "Point", "Ranks", "draw"]
