"""Analysis: measures of attention and representations, on any opened tower."""

import importlib
from typing import TYPE_CHECKING, Any

from tir_kernels.analysis.measures import MEASURES, measure_class

if TYPE_CHECKING:
    from tir_kernels.analysis.reader import measure, measure_tokens

__all__ = ["MEASURES", "measure", "measure_class", "measure_tokens"]


def __getattr__(name: str) -> Any:
    # The command line names the measures in its help, which should not wait for PyTorch.
    if name in ("measure", "measure_tokens"):
        return getattr(importlib.import_module(f"{__name__}.reader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
