"""The backend that serves a call, and what those that cannot run say."""

import pytest
import torch

import tir_kernels
from tir_kernels.operators import choose as dispatch


def test_reasons_are_given_for_all_backends() -> None:
    reasons = tir_kernels.available_backends()
    assert list(reasons) == ["reference", "cpu", "triton", "cuda"]
    assert reasons["reference"] == ""
    if not torch.cuda.is_available():
        assert "no CUDA device" in reasons["cuda"] or "put nvcc" in reasons["cuda"]


def test_a_backend_that_cannot_run_says_why() -> None:
    q = torch.randn(1, 1, 5, 64)
    with pytest.raises(
        (RuntimeError, ValueError),
        match=r"backend='cuda' cannot (run here|take tensors on 'cpu'): ",
    ):
        tir_kernels.weighted_attention(q, q, q, torch.ones(1, 5), backend="cuda")


def test_float64_is_for_the_reference() -> None:
    if tir_kernels.available_backends()["cpu"]:
        pytest.skip("the cpu backend is not built")
    q = torch.randn(1, 1, 5, 64, dtype=torch.float64)
    weights = torch.ones(1, 5)
    with pytest.raises(TypeError, match=r"backend='cpu' takes float32.*Use backend='reference'"):
        tir_kernels.weighted_attention(q, q, q, weights, backend="cpu")
    assert tir_kernels.weighted_attention(q, q, q, weights).dtype == torch.float64


def test_wide_heads_are_for_the_reference() -> None:
    if tir_kernels.available_backends()["cpu"]:
        pytest.skip("the cpu backend is not built")
    q = torch.randn(1, 1, 5, 300)
    weights = torch.ones(1, 5)
    with pytest.raises(ValueError, match="width up to 256; query has width 300"):
        tir_kernels.weighted_attention(q, q, q, weights, backend="cpu")
    assert tir_kernels.weighted_attention(q, q, q, weights).shape == q.shape


def test_auto_prefers_the_kernels() -> None:
    expected = "reference" if tir_kernels.available_backends()["cpu"] else "cpu"
    cpu = torch.device("cpu")
    assert dispatch.choose_backend("auto", cpu, False).__name__.endswith(expected)
    assert dispatch.choose_backend("auto", cpu, True).__name__.endswith("reference")
