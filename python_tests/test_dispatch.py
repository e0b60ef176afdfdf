"""The backend that serves a call, and what those that cannot run say."""

import subprocess
import sys

import pytest
import torch

import tir_kernels
from tir_kernels.backends.reference import ReferenceBackend
from tir_kernels.operators import choose as dispatch
from tir_kernels.operators.dropout import philox_dropout


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
    call = ("auto", "attention_forward", torch.device("cpu"))
    assert dispatch.choose_backend(*call, torch.float32).name == expected
    assert dispatch.choose_backend(*call, torch.float64).name == "reference"


class Stranger(ReferenceBackend):
    """A backend that lacks what reference can do beside the protocol."""

    name = "stranger"
    max_head_dim = 8
    dtypes = (torch.float32,)
    philox_dropout = property()  # no attribute of this name


def test_a_backend_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_registered", {})
    dispatch.register_backend("stranger", "test_dispatch:Stranger")
    assert dispatch.backend_names()[-1] == "stranger"
    q, weights = torch.randn(1, 2, 5, 8), torch.rand(1, 5)
    for given in (weights, None):
        ours = tir_kernels.weighted_attention(q, q, q, given, backend="stranger")
        theirs = tir_kernels.weighted_attention(q, q, q, given, backend="reference")
        assert torch.equal(ours, theirs)
    with pytest.raises(
        ValueError, match=r"'stranger' takes heads of width up to 8; query has .* 9"
    ):
        tir_kernels.weighted_attention(*3 * [torch.randn(1, 1, 5, 9)], backend="stranger")
    with pytest.raises(TypeError, match=r"'stranger' takes float32; got torch.bfloat16"):
        tir_kernels.weighted_attention(*3 * [q.bfloat16()], backend="stranger")
    seed = torch.tensor([0])
    with pytest.raises(ValueError, match="'stranger' has no philox_dropout: use backend='auto' or"):
        philox_dropout(torch.ones(1, 2, 3, 4), seed, seed, backend="stranger")
    for taken in ("auto", "cpu"):
        with pytest.raises(ValueError, match=f"backend name '{taken}' is taken"):
            dispatch.register_backend(taken, Stranger())


@pytest.mark.slow
def test_names_and_choices_need_no_pytorch() -> None:
    program = (
        "import sys\n"
        "import tir_kernels.rules, tir_kernels.scalars, tir_kernels.operators.choose as choose\n"
        "tir_kernels.rules.WeightRule('suppress', strength=1)\n"
        "choose.require_backend('cuda')\n"
        "assert 'torch' not in sys.modules\n"
        "import tir_kernels.flops\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
