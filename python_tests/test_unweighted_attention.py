"""Attention without weights: to the bit that of weights of 1, and as exact, on every backend."""

import importlib

import oracle
import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators import attending
from tir_kernels.operators.choose import load_backend
from tir_kernels.operators.known_calls import KnownCalls

# The package's own name for it is the function.
weighted_attention = importlib.import_module("tir_kernels.operators.weighted_attention")

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(2, 3, 50, 64), (1, 2, 33, 80), (2, 1, 1, 8)]  # B, H, L, d


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v as views of a packed projection, and a gradient of the output."""
    batch, heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(length)
    packed = torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(device, dtype)
    grad_output = torch.randn(shape, generator=generator).to(device, dtype)
    return list(packed.permute(2, 0, 3, 1, 4)), grad_output


def attend(
    rows: list[Tensor], grad_output: Tensor, weights: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in rows]
    output = tir_kernels.weighted_attention(*leaves, weights, backend=backend)
    return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_weights_of_one(
    backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows, grad_output = draw(shape, dtype, device)
    ones = torch.ones(shape[0], shape[2], device=device)
    ours = attend(rows, grad_output, None, backend)
    expected = attend(rows, grad_output, ones, backend)
    for result, other in zip(ours, expected, strict=True):
        assert result.dtype == dtype
        assert torch.equal(result, other)
    named = oracle.run_attention(
        load_backend(backend), AttentionInputs(*rows, None, 0.1), grad_output, False
    )
    given = oracle.run_attention(
        load_backend(backend), AttentionInputs(*rows, ones, 0.1), grad_output, False
    )
    assert named[5].shape == (0,)
    for result, other in zip(named[:5], given[:5], strict=True):
        assert torch.equal(result, other)  # the log-sum-exp too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(backend: str, device: str, dtype: torch.dtype) -> None:
    (q, k, v), grad_output = draw((2, 2, 50, 64), dtype, device)
    ones = torch.ones(2, 50, device=device)
    arguments = (q, k, v, ones, 0.125, grad_output)
    exact, magnitudes = oracle.exact_attention(*arguments)
    plain = oracle.plain_gradients(*arguments)
    results = attend([q, k, v], grad_output, None, backend)
    names = ("output", "grad q", "grad k", "grad v")
    for name, *of_name in zip(names, results, plain, exact[:4], magnitudes[:4], strict=True):
        oracle.assert_as_accurate(name, *of_name)


def test_no_tensor_of_ones_is_made(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    made: list[tuple[int, ...]] = []
    for name in ("ones", "full", "ones_like", "full_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, m=make, **k: made.append(a) or m(*a, **k))
    new_ones = Tensor.new_ones
    monkeypatch.setattr(Tensor, "new_ones", lambda *a, **k: made.append(a) or new_ones(*a, **k))
    device = "cuda" if backend == "cuda" else "cpu"
    rows, grad_output = draw((1, 2, 20, 16), torch.float32, device)
    attend(rows, grad_output, None, backend)
    assert not made
    torch.ones(1)
    assert made  # what was watched for would have been seen


def test_gradcheck_of_the_reference() -> None:
    q, k, v = (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(*inputs: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(*inputs, scale=0.7, backend="reference")

    assert torch.autograd.gradcheck(attend, (q, k, v))


def test_against_pytorch() -> None:
    q, k, v = (torch.randn(2, 3, 19, 32, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(tir_kernels.weighted_attention(q, k, v), expected)


def test_a_nan_in_a_key_is_not_hidden(backend: str, device: str) -> None:
    (q, k, v), _ = draw((1, 1, 17, 64), torch.float32, device)
    k = k.clone()
    k[0, 0, 3, 5] = torch.nan
    assert tir_kernels.weighted_attention(q, k, v, backend=backend).isnan().all()


def test_opcheck(backend: str, device: str) -> None:
    ops = torch.ops.tir_kernels
    (q, k, v), grad_output = draw((2, 2, 20, 16), torch.float32, device)
    output, log_sum_exp = ops.weighted_attention(q, k, v, None, 0.1, False, backend)
    torch.library.opcheck(ops.weighted_attention.default, (q, k, v, None, 0.1, False, backend))
    saved = (q, k, v, None, output, log_sum_exp, 0.1, False, False, False, backend)
    torch.library.opcheck(ops.weighted_attention_backward.default, (grad_output, *saved))


@pytest.mark.slow
def test_compile_is_one_graph(backend: str, device: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(q, k, v, backend=backend).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 23):
        rows, _ = draw((2, 2, length, 16), torch.float32, device)
        leaves = [t.detach().requires_grad_() for t in rows]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        grads = torch.autograd.grad(compiled(*leaves), leaves)
        for ours, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, other)


def test_export(backend: str, device: str) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tir_kernels.weighted_attention(q, k, v, backend=backend)

    rows, _ = draw((2, 2, 20, 16), torch.float32, device)
    exported = torch.export.export(Attend(), tuple(rows))
    assert torch.equal(exported.module()(*rows), Attend()(*rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_meta_tensors_and_empty_batches(dtype: torch.dtype) -> None:
    for shape, place in (((2, 3, 10, 16), "meta"), ((0, 2, 5, 64), "cpu"), ((2, 2, 0, 64), "cpu")):
        q = torch.randn(shape, dtype=dtype, device=place, requires_grad=True)
        output = tir_kernels.weighted_attention(q, q, q)
        (grad,) = torch.autograd.grad(output.sum(), q)
        assert output.shape == grad.shape == shape
        assert output.dtype == grad.dtype == dtype


def test_autocast(backend: str, device: str) -> None:
    rows, _ = draw((2, 2, 20, 16), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = tir_kernels.weighted_attention(*rows, backend=backend)
    low = [t.bfloat16() for t in rows]
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, tir_kernels.weighted_attention(*low, backend=backend))


def test_a_second_derivative_is_refused() -> None:
    q = torch.randn(1, 2, 6, 8, requires_grad=True)
    output = tir_kernels.weighted_attention(q, q, q)
    (grad,) = torch.autograd.grad(output.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), q)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_backend_that_is_named_serves(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = load_backend(backend)
    if reason := chosen.unavailable():
        pytest.skip(reason)
    # A call like one before asks for a launch that is remembered.
    monkeypatch.setattr(weighted_attention, "_known_calls", KnownCalls())
    monkeypatch.setattr(attending, "_known_gradients", KnownCalls())
    asked = []
    for name in ("attention_forward", "attention_backward"):
        function = getattr(chosen, name)
        monkeypatch.setattr(
            chosen, name, lambda *a, n=name, f=function: asked.append((n, a[0].weights)) or f(*a)
        )
    rows, grad_output = draw((1, 2, 20, 16), torch.float32, "cpu")
    attend(rows, grad_output, None, backend)
    assert asked == [("attention_forward", None), ("attention_backward", None)]
