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
    "received-mass": "tir_kernels.analysis.measures.received_mass:ReceivedMass",
    "top-patch": "tir_kernels.analysis.measures.top_patch:TopPatch",
    "attention-entropy": "tir_kernels.analysis.measures.attention_entropy:AttentionEntropy",
    "norm-outliers": "tir_kernels.analysis.measures.norm_outliers:NormOutliers",
    "massive-activations": "tir_kernels.analysis.measures.massive_activations:MassiveActivations",
    "norms-by-count": "tir_kernels.analysis.measures.norms_by_count:NormsByCount",
    "relevance-by-count": "tir_kernels.analysis.measures.relevance_by_count:RelevanceByCount",
    "selection-overlap": "tir_kernels.analysis.measures.selection_overlap:SelectionOverlap",
    "count-histogram": "tir_kernels.analysis.measures.count_histogram:CountHistogram",
    "separability": "tir_kernels.analysis.measures.separability:Separability",
    "cka": "tir_kernels.analysis.measures.cka:Cka",
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
