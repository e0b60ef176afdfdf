"""Analysis: measures of attention and representations, on any opened tower."""

from tir_kernels.analysis.measures import MEASURES, measure_class
from tir_kernels.analysis.reader import measure, measure_tokens
from tir_kernels.analysis.similarity import linear_cka, permutation_null

__all__ = [
    "MEASURES",
    "linear_cka",
    "measure",
    "measure_class",
    "measure_tokens",
    "permutation_null",
]
