"""Analysis: measures of attention and representations, on any opened tower."""

import importlib
from typing import TYPE_CHECKING, Any

from tir_kernels.analysis.measures import MEASURES, measure_class

if TYPE_CHECKING:
    from tir_kernels.analysis.reader import measure
    from tir_kernels.analysis.similarity import linear_cka, permutation_null

_HOMES = {
    "linear_cka": "similarity",
    "measure": "reader",
    "permutation_null": "similarity",
}

__all__ = [
    "MEASURES",
    "linear_cka",
    "measure",
    "measure_class",
    "permutation_null",
]


def __getattr__(name: str) -> Any:
    # The command line names the measures in its help, which should not wait for PyTorch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
