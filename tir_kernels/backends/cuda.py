"""The place of the CUDA C++ kernels, which this version does not have yet."""

from __future__ import annotations


def unavailable_reason() -> str:
    return "this version has no CUDA C++ kernels; on a GPU use backend='triton'"
