"""Measures, one file each.

To add one, write a file like ``sink_ratio.py`` and name it in ``MEASURES``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tir_kernels.registry import chosen

if TYPE_CHECKING:
    from tir_kernels.analysis.measures.protocol import BlockView, Finding, Measure

# Name -> "module:Class".
MEASURES = {
    "sink-ratio": "tir_kernels.analysis.measures.sink_ratio:SinkRatio",
}

__all__ = ["MEASURES", "BlockView", "Finding", "Measure", "measure_class"]


def __getattr__(name: str) -> Any:
    # Names of measures are known without PyTorch.
    if name in ("BlockView", "Finding", "Measure"):
        return getattr(importlib.import_module(f"{__name__}.protocol"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def measure_class(name: str) -> type[Measure]:
    """The class of a measure in the registry.

    Raises:
        ValueError: There is none of that name.
    """
    return chosen(MEASURES, "measure", name)
