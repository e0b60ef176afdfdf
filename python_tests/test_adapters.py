"""Counted dropout and the activations of frozen layers, on every backend that runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tir_kernels.backends import reference
from tir_kernels.operators.adapters import bias_activation, philox_dropout
from tir_kernels.operators.choose import available_backends, load_backend

HAS_CPU_KERNELS = not available_backends()["cpu"]
needs_cpu_kernels = pytest.mark.skipif(not HAS_CPU_KERNELS, reason="the CPU kernels are not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = torch.tensor([12345678901234567, 7])


def dropped_by(backend: Any, rows: Tensor, dtype: torch.dtype, **changed: Any) -> Tensor:
    groups, sequences, length, width = rows.shape
    arguments = {
        "seeds": SEEDS[:groups],
        "step": torch.tensor([3]),
        "stream": 5,
        "first_branch": 1,
        "threshold": 1 << 14,
        "scale": 4 / 3,
    } | changed
    output = torch.full((groups, 2, sequences, length, width), float("nan"), dtype=dtype)
    backend.philox_dropout(rows, output=output, **arguments)
    return output


def test_random_numbers_are_those_of_philox() -> None:
    # The published test vectors of Philox4x32-10: counter and key of zeros, and of ones.
    def words(counter: int, key: int) -> list[int]:
        found = reference._philox([torch.tensor(counter)] * 4, torch.tensor(key))
        return [int(word) for word in found]

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0xFFFFFFFF, -1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@needs_cpu_kernels
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
def test_cpu_kernel_drops_what_the_reference_drops(
    sequences: int, length: int, width: int, dtype, output_dtype, stream: int, step: int
) -> None:
    rows = torch.randn(2, sequences, length, width).to(dtype)
    changed = {"stream": stream, "step": torch.tensor([step])}
    expected = dropped_by(reference, rows, output_dtype, **changed)
    assert torch.equal(dropped_by(load_backend("cpu"), rows, output_dtype, **changed), expected)


@needs_cpu_kernels
def test_every_instruction_set_and_number_of_threads_drops_the_same(restored_kernels) -> None:
    kernels = restored_kernels
    rows = torch.randn(2, 9, 50, 200)
    expected = dropped_by(reference, rows, torch.float32)
    before = torch.get_num_threads()
    try:
        for name, is_supported in kernels.architectures():
            for threads in (1, 3):
                if is_supported:
                    kernels.use_architecture(name)
                    torch.set_num_threads(threads)
                    ours = dropped_by(load_backend("cpu"), rows, torch.float32)
                    assert torch.equal(ours, expected), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def restored_kernels():
    from tir_kernels import _C

    before = _C.architecture()
    yield _C
    _C.use_architecture(before)


@pytest.mark.slow
def test_interpreted_triton_kernel_drops_what_the_reference_drops() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = """
import torch
from tir_kernels.backends import reference, triton
for width in (1, 24, 100):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.randn(2, 3, 5, width).to(dtype)
        seeds, step = torch.randint(-(2**62), 2**62, (2,)), torch.tensor([77])
        expected = torch.full((2, 2, 3, 5, width), float("nan"), dtype=dtype)
        ours = expected.clone()
        for backend, output in ((reference, expected), (triton, ours)):
            backend.philox_dropout(rows, seeds, step, 250, 1, 16384, 4 / 3, output)
        assert torch.equal(ours, expected), (width, dtype)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_drops_what_the_reference_drops(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 5, 197, 768).to(dtype)
    arguments = {"stream": 200, "num_branches": 3, "probability": 0.25}
    step = torch.tensor([9])
    expected = philox_dropout(rows, SEEDS, step, **arguments)
    ours = philox_dropout(rows.cuda(), SEEDS.cuda(), step.cuda(), **arguments)
    assert torch.equal(ours.cpu(), expected)


def test_the_share_that_is_dropped_and_the_mean_that_is_kept() -> None:
    rows = torch.ones(2, 20, 50, 96)
    kept = philox_dropout(rows, SEEDS, torch.tensor([0]), num_branches=3, probability=0.3)
    share = (kept == 0).float().mean((2, 3, 4))
    torch.testing.assert_close(share, torch.full((2, 3), 0.3), atol=0.01, rtol=0)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)


@pytest.mark.parametrize("what", ["seed", "step", "stream", "branch", "sequence", "position"])
def test_draws_are_independent(what: str) -> None:
    rows = torch.ones(1, 2, 2, 20000)

    def kept(seed: int = 1, step: int = 1, **others: int) -> Tensor:
        return philox_dropout(
            rows, torch.tensor([seed]), torch.tensor([step]), probability=0.5, **others
        ).bool()[0, 0]

    one = kept()[0, 0]
    other = {
        "seed": lambda: kept(seed=2)[0, 0],
        "step": lambda: kept(step=2)[0, 0],
        "stream": lambda: kept(stream=1)[0, 0],
        "branch": lambda: kept(first_branch=1)[0, 0],
        "sequence": lambda: kept()[1, 0],
        "position": lambda: kept()[0, 1],
    }[what]()
    assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_group_gets_what_it_gets_alone_however_far_it_is_padded() -> None:
    rows = torch.randn(2, 3, 7, 40)
    arguments = {"num_branches": 3, "probability": 0.25, "stream": 3}
    together = philox_dropout(rows, SEEDS, torch.tensor([4]), **arguments)
    alone = philox_dropout(rows[1:, :, :5], SEEDS[1:], torch.tensor([4]), **arguments)
    assert torch.equal(together[1:, :, :, :5], alone)
    later = philox_dropout(
        rows, SEEDS, torch.tensor([4]), first_branch=2, probability=0.25, stream=3
    )
    assert torch.equal(together[:, 2:], later)


def test_empty_rows() -> None:
    kept = philox_dropout(torch.empty(2, 0, 7, 40), SEEDS, torch.tensor([0]), num_branches=3)
    assert kept.shape == (2, 3, 0, 7, 40)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"rows": torch.ones(2, 3, 4)}, ValueError, "rows must have shape"),
        ({"seeds": SEEDS[:1]}, ValueError, "seeds"),
        ({"seeds": SEEDS.int()}, TypeError, "int64"),
        ({"probability": 1.0}, ValueError, "probability"),
        ({"stream": 256}, ValueError, "stream"),
        ({"first_branch": 255, "num_branches": 2}, ValueError, "branches"),
    ],
)
def test_unsuitable_dropout_is_refused(changed: dict, kind: type, message: str) -> None:
    arguments = {"rows": torch.ones(2, 3, 4, 8), "seeds": SEEDS, "step": torch.tensor([0])}
    with pytest.raises(kind, match=message):
        philox_dropout(**(arguments | changed))


PLAIN = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def value_and_gradient(
    function: Any, hidden: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    value = function(hidden, bias)
    value.backward(grad)
    return value.detach().double(), hidden.grad.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", [(3, 5, 200), (7, 1), (40, 1029)])
def test_activation_is_as_exact_as_pytorch(kind: str, dtype: torch.dtype, shape: tuple) -> None:
    hidden = (torch.randn(shape) * 3).to(dtype)
    bias, grad = torch.randn(shape[-1:]).to(dtype), torch.randn(shape).to(dtype)

    def plain(hidden: Tensor, bias: Tensor) -> Tensor:
        return PLAIN[kind](hidden + bias)

    exact = value_and_gradient(plain, hidden.double(), bias.double(), grad.double())
    theirs = value_and_gradient(plain, hidden, bias, grad)
    ours = value_and_gradient(lambda h, b: bias_activation(h, b, kind), hidden, bias, grad)
    for expected, their, our in zip(exact, theirs, ours, strict=True):
        # One rounding of the largest result is allowed where PyTorch happens to be exact.
        rounding = torch.finfo(dtype).eps * expected.abs().max()
        assert (our - expected).abs().max() <= 2 * (their - expected).abs().max() + rounding
        assert (our - expected).abs().mean() <= 2 * (their - expected).abs().mean() + rounding / 8


@needs_cpu_kernels
@pytest.mark.parametrize("kind", PLAIN)
def test_every_instruction_set_activates(kind: str, restored_kernels) -> None:
    hidden, bias = torch.randn(9, 77) * 4, torch.randn(77)
    expected = PLAIN[kind]((hidden + bias).double()).float()
    for name, is_supported in restored_kernels.architectures():
        if is_supported:
            restored_kernels.use_architecture(name)
            torch.testing.assert_close(bias_activation(hidden, bias, kind), expected)


@pytest.mark.parametrize("kind", PLAIN)
def test_activation_at_extremes(kind: str) -> None:
    points = [0.0, 1e-30, -1e-30, 40.0, -40.0, 300.0, -300.0, 1e30, -1e30, float("inf")]
    hidden = torch.tensor([points]).requires_grad_()
    value = bias_activation(hidden, None, kind)
    expected = PLAIN[kind](hidden.detach().double()).float()
    expected[0, -1] = torch.inf  # PyTorch's gelu gives NaN
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value[:, :-1].sum(), hidden)
    assert torch.isfinite(grad[:, :-1]).all()
    nan = torch.full((1, 3), float("nan"))
    assert bias_activation(nan, None, kind).isnan().all()


def test_activation_without_bias_and_of_other_types() -> None:
    hidden = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(bias_activation(hidden, None), F.gelu(hidden))
    mixed = bias_activation(hidden.bfloat16(), torch.ones(6))
    torch.testing.assert_close(mixed, F.gelu(hidden.bfloat16().float() + 1).bfloat16())
    transposed = hidden.float().T
    torch.testing.assert_close(bias_activation(transposed, None), F.gelu(transposed))
    assert bias_activation(torch.empty(0, 6), None).shape == (0, 6)


def test_activation_gradients() -> None:
    hidden = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    for kind in PLAIN:
        assert torch.autograd.gradcheck(lambda h, k=kind: bias_activation(h, bias, k), [hidden])


def test_unsuitable_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of gelu, quick_gelu"):
        bias_activation(torch.ones(2, 3), None, "relu")
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\)"):
        bias_activation(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match="frozen"):
        bias_activation(torch.ones(2, 3), torch.ones(3, requires_grad=True))


@pytest.mark.slow
def test_operators_pass_opcheck() -> None:
    ops = torch.ops.tir_kernels
    rows, step = torch.randn(2, 3, 4, 8), torch.tensor([0])
    arguments = (rows, SEEDS, step, 1, 0, 3, 0.25, torch.float32)
    torch.library.opcheck(ops.philox_dropout.default, arguments)
    torch.library.opcheck(ops.bias_activation.default, (rows, torch.randn(8), "gelu", None))
