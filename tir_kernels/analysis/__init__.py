"""Analysis: measures of attention and representations, on any opened tower."""

from tir_kernels.analysis.measures import MEASURES, measure_class
from tir_kernels.analysis.reader import measure, measure_tokens

__all__ = ["MEASURES", "measure", "measure_class", "measure_tokens"]
