"""Attention received and entropy in all blocks of timm's ViT-B/16, beside timm's extraction.

    pytest bench/micro/test_extraction.py --benchmark-only

``timm.utils.AttentionExtract`` returns every (B, H, L, L) matrix, from attention that is written
out; the same statistics are then summed from them. Nothing here asserts a time.
"""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.utils import AttentionExtract
from torch import Tensor, nn

from bench.micro.timed import DEVICE, measure_rounds
from tir_kernels import AttentionStatistics, analysis
from tir_kernels.analysis.measures import BlockView, Finding

BATCH, ROUNDS = (64, 20) if DEVICE == "cuda" else (5, 5)


@pytest.fixture(scope="module")
def model():
    set_fused_attn(False)  # AttentionExtract finds the matrices of written-out attention alone
    try:
        yield timm.create_model("vit_base_patch16_224", pretrained=False).to(DEVICE).eval()
    finally:
        set_fused_attn(True)


class _Keep:
    """Keeps the statistics of each block."""

    name = "keep"

    def __init__(self) -> None:
        self.found: list[AttentionStatistics] = []

    def of_block(self, view: BlockView) -> tuple[Finding, ...]:
        self.found.append(view.attention)
        return ()


def _by_measure(model: nn.Module, images: Tensor) -> list[AttentionStatistics]:
    keep = _Keep()
    analysis.measure(model, images, [keep])
    return keep.found


@torch.no_grad()
def _by_extraction(extract: nn.Module, images: Tensor) -> list[AttentionStatistics]:
    matrices = [matrix for matrix in extract(images).values() if matrix.dim() == 4]
    return [
        AttentionStatistics(
            matrix[:, :, :1].mean(2),
            matrix[:, :, 1:].mean(2),
            torch.special.entr(matrix).sum(-1),
            matrix.new_empty(0),
        )
        for matrix in matrices
    ]


def test_measure(benchmark, model) -> None:
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    measure_rounds(benchmark, lambda: _by_measure(model, images), ROUNDS)
    found, matrices = _by_measure(model, images), _by_extraction(AttentionExtract(model), images)
    for ours, theirs in zip(found, matrices, strict=True):
        for name in ("received_from_prefix", "received_from_patches", "entropy"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name), rtol=1e-3, atol=1e-5
            )


def test_timm_extraction(benchmark, model) -> None:
    images, extract = torch.randn(BATCH, 3, 224, 224, device=DEVICE), AttentionExtract(model)
    measure_rounds(benchmark, lambda: _by_extraction(extract, images), ROUNDS)
