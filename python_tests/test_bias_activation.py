"""Bias and activation of frozen layers: as exact as PyTorch's, on every backend that has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tir_kernels
from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.operators.choose import load_backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PLAIN = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def value_and_gradient(
    function: Any, hidden: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    value = function(hidden, bias)
    value.backward(grad)
    return value.detach().double(), hidden.grad.double()


def check(shape: tuple, dtype: torch.dtype, kind: str, backend: str) -> None:
    """Value and gradient against float64, beside those of plain PyTorch."""
    hidden = (torch.randn(shape) * 3).to(dtype)
    bias, grad = torch.randn(shape[-1:]).to(dtype), torch.randn(shape).to(dtype)

    def plain(hidden: Tensor, bias: Tensor) -> Tensor:
        return PLAIN[kind](hidden + bias)

    def mine(hidden: Tensor, bias: Tensor) -> Tensor:
        return bias_activation(hidden, bias, kind, backend=backend)

    exact = value_and_gradient(plain, hidden.double(), bias.double(), grad.double())
    theirs = value_and_gradient(plain, hidden, bias, grad)
    ours = value_and_gradient(mine, hidden, bias, grad)
    for expected, their, our in zip(exact, theirs, ours, strict=True):
        # One rounding of the largest result is allowed where PyTorch happens to be exact.
        rounding = torch.finfo(dtype).eps * expected.abs().max()
        assert (our - expected).abs().max() <= 2 * (their - expected).abs().max() + rounding
        assert (our - expected).abs().mean() <= 2 * (their - expected).abs().mean() + rounding / 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("shape", [(3, 5, 200), (7, 1), (40, 1029)])
def test_activation_is_as_exact_as_pytorch(kind: str, dtype: torch.dtype, shape: tuple) -> None:
    check(shape, dtype, kind, "auto")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
def test_every_backend_is_as_exact_as_pytorch(kind: str, dtype: torch.dtype, backend: str) -> None:
    if reason := tir_kernels.available_backends()[backend]:
        pytest.skip(f"backend {backend}: {reason}")
    torch.manual_seed(0)
    check((40, 1029), dtype, kind, backend)


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
    with pytest.raises(ValueError, match="kind must be one of gelu, quick_gelu, gelu_tanh"):
        bias_activation(torch.ones(2, 3), None, "relu")
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\)"):
        bias_activation(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(TypeError, match=r"hidden must be float32.*got torch\.int64"):
        bias_activation(torch.ones(2, 3, dtype=torch.int64), None)
    with pytest.raises(TypeError, match="bias must be a tensor"):
        bias_activation(torch.ones(2, 3), 1.0)
    with pytest.raises(ValueError, match=r"hidden must have shape \(\.\.\., D\)"):
        bias_activation(torch.tensor(1.0), None)
    with pytest.raises(ValueError, match="frozen"):
        bias_activation(torch.ones(2, 3), torch.ones(3, requires_grad=True))


def test_the_backend_that_is_named_serves_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    reference = load_backend("reference")
    activate = reference.bias_activation

    def watch(*arguments: Any) -> Tensor:
        asked.append(arguments[3] is not None)
        return activate(*arguments)

    monkeypatch.setattr(reference, "bias_activation", watch)
    hidden = torch.randn(3, 5, requires_grad=True)
    bias_activation(hidden, None, backend="reference").sum().backward()
    assert asked == [False, True]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_without_activations_is_refused_with_those_that_have_them(backend: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"backend='{backend}' has no bias_activation: use backend='auto' or one of "
        "'reference', 'cpu'$",
    ):
        bias_activation(torch.ones(2, 3), None, backend=backend)
    with pytest.raises(ValueError, match=r"^backend must be 'auto' or one of reference"):
        bias_activation(torch.ones(2, 3), None, backend="fast")


def test_float64_is_for_the_reference() -> None:
    if reason := tir_kernels.available_backends()["cpu"]:
        pytest.skip(f"backend cpu: {reason}")
    with pytest.raises(TypeError, match=r"backend='cpu' takes float32, float16 and bfloat16; got"):
        bias_activation(torch.ones(2, 3, dtype=torch.float64), None, backend="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend: str) -> None:
    rows, bias = torch.randn(2, 3, 4, 8), torch.randn(8)
    for grad_output in (None, torch.randn(2, 3, 4, 8)):
        arguments = (rows, bias, "gelu", grad_output, backend)
        torch.library.opcheck(torch.ops.tir_kernels.bias_activation.default, arguments)
