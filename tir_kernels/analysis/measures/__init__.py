"""Measures, one file each.

To add one, write a file like ``sink_ratio.py`` and name it in ``MEASURES``.
"""

from __future__ import annotations

from tir_kernels.analysis.measures.protocol import BlockView, Finding, Measure
from tir_kernels.registry import chosen

# Name -> "module:Class".
MEASURES = {
    "sink-ratio": "tir_kernels.analysis.measures.sink_ratio:SinkRatio",
}

__all__ = ["MEASURES", "BlockView", "Finding", "Measure", "measure_class"]


def measure_class(name: str) -> type[Measure]:
    """The class of a measure in the registry.

    Raises:
        ValueError: There is none of that name.
    """
    return chosen(MEASURES, "measure", name)
