"""Attention statistics of the Triton backend against float64, interpreted or on a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, run_statistics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "head_dim"), [(70, 17), (130, 64)])
def test_statistics(length: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    run_statistics(1, 2, length, head_dim, dtype, device)


@pytest.mark.parametrize("head_dim", [3, 80, 96, 160, 256])
def test_statistics_of_every_head_dim(head_dim: int, device: str) -> None:
    run_statistics(1, 1, 20, head_dim, torch.bfloat16, device)
