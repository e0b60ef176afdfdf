"""weighted_attention on every backend that runs here: accuracy, exact zeros, layouts, same bits."""

import math

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import tir_kernels

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_WIDTHS = (64, 72, 80, 88, 96, 104, 112, 128)
LENGTHS = (50, 197, 257, 577)
quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def draw_weights(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    weights = torch.rand(batch, length, generator=generator) * 2
    if kind == "mixed":  # as the linear rule gives with large strengths: zero and below too
        weights = weights.mul(4).floor().div(2) - 1
    elif kind == "one":
        weights = torch.ones(batch, length)
    elif kind == "empty row":
        weights[0] = 0.0
        weights[-1, ::2] = -1.0
    return weights


def draw_heads(
    batch: int, heads: int, length: int, width: int, layout: str, generator: torch.Generator
) -> list[Tensor]:
    """q, k, v as views of the layouts that models produce."""
    if layout == "packed":
        packed = torch.randn(batch, length, 3, heads, width, generator=generator)
        return list(packed.permute(2, 0, 3, 1, 4))
    if layout == "sequence first":
        shape = (length, batch, heads, width)
        return [torch.randn(shape, generator=generator).permute(1, 2, 0, 3) for _ in range(3)]
    shape = (batch, heads, length, width)
    if layout == "padded":
        shape = (*shape[:3], width + 3)
    return [torch.randn(shape, generator=generator)[..., :width] for _ in range(3)]


def check(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, backend: str, scale: float) -> None:
    """Output and all gradients against float64."""
    grad_output = torch.randn(
        q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32
    ).to(q)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, weights)]
    output = tir_kernels.weighted_attention(*leaves, scale=scale, backend=backend)
    assert output.dtype == q.dtype
    grads = torch.autograd.grad(output, leaves, grad_output)
    ours = (output.detach(), *grads)
    oracle.assert_attention_as_accurate(ours, q, k, v, weights, scale, grad_output)


def sizes(is_slow: bool) -> tuple[int, tuple[int, ...]]:
    """Longest random length, and the lengths always tried."""
    return (70, (50,)) if is_slow else (1100, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_that_matter(backend: str, device: str, is_slow: bool, dtype: torch.dtype) -> None:
    for length in sizes(is_slow)[1]:
        generator = torch.Generator().manual_seed(length)
        q, k, v = (t.to(device, dtype) for t in draw_heads(2, 2, length, 64, "packed", generator))
        weights = draw_weights("mixed", 2, length, generator).to(device)
        check(q, k, v, weights, backend, 0.125)


@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_head_widths(backend: str, device: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    for dtype in DTYPES:
        q, k, v = (t.to(device, dtype) for t in draw_heads(1, 2, 33, width, "packed", generator))
        weights = draw_weights("uniform", 1, 33, generator).to(device)
        check(q, k, v, weights, backend, width**-0.5)


def test_a_row_of_one_key_of_small_weight(backend: str, device: str) -> None:
    """Its probability is 1 however small the weight; the stored log-sum-exp is far from 0."""
    for seed, weight in ((524, 0.0097), (1, 1e-6), (2, 1e-30)):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (t.to(device) for t in draw_heads(1, 1, 1, 1, "padded", generator))
        check(q, k, v, torch.full((1, 1), weight, device=device), backend, 1.0)


def random_heads(longest: int) -> dict[str, st.SearchStrategy]:
    return {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "length": st.integers(1, longest),
        "width": st.sampled_from(HEAD_WIDTHS) | st.integers(1, 20),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(["contiguous", "packed", "sequence first", "padded"]),
    }


@pytest.mark.slow
def test_random_shapes(backend: str, device: str, is_slow: bool) -> None:
    longest, _ = sizes(is_slow)

    @settings(quick, max_examples=40 if longest > 100 else 12)
    @given(
        **random_heads(longest),
        kind=st.sampled_from(["uniform", "mixed", "one", "empty row"]),
        seed=st.integers(0, 2**31),
    )
    def run(batch, heads, length, width, dtype, layout, kind, seed) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = draw_heads(batch, heads, length, width, layout, generator)
        q, k, v = (t.to(device, dtype) for t in drawn)
        weights = draw_weights(kind, batch, length, generator).to(device)
        check(q, k, v, weights, backend, width**-0.5)

    run()


def test_weightless_keys_are_not_attended_to(backend: str, device: str) -> None:
    """Not even a NaN or infinity in such a key or value may reach the output or a gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (t.to(device) for t in draw_heads(1, 2, 37, 64, "packed", generator))
    weights = draw_weights("uniform", 1, 37, generator).to(device)
    weights[0, 5], weights[0, 20] = 0.0, -2.0
    kept = [n for n in range(37) if n not in (5, 20)]
    k[:, :, [5, 20]], v[:, :, 5], v[:, :, 20] = math.nan, math.inf, math.nan
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    output = tir_kernels.weighted_attention(*leaves, weights, backend=backend)
    output.sum().backward()
    grad_q, grad_k, grad_v = (t.grad for t in leaves)
    expected = tir_kernels.weighted_attention(
        *(t[:, :, kept] for t in (q, k, v)), weights[:, kept], backend=backend
    )
    torch.testing.assert_close(output[:, :, kept], expected)
    assert output.isfinite().all()
    assert grad_q.isfinite().all()
    for grad in (grad_k, grad_v):
        assert (grad[:, :, [5, 20]] == 0).all()
        assert grad[:, :, kept].isfinite().all()


def test_rows_without_weight_are_zero(backend: str, device: str) -> None:
    shape = (2, 2, 19, 64)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    weights = torch.ones(2, 19, device=device)
    weights[1] = 0.0
    weights.requires_grad_()
    output = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
    output.square().sum().backward()
    assert (output[1] == 0).all()
    assert all((t.grad[1] == 0).all() for t in (q, k, v, weights))
    assert all(t.grad[0].isfinite().all() for t in (q, k, v, weights))


def test_nan_weight_is_not_hidden(backend: str, device: str) -> None:
    q = torch.randn(1, 1, 17, 64, device=device)
    weights = torch.ones(1, 17, device=device)
    weights[0, 3] = math.nan
    assert tir_kernels.weighted_attention(q, q, q, weights, backend=backend).isnan().all()


def test_gradient_at_weight_zero_is_the_one_sided_limit(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (t.to(device) for t in draw_heads(1, 2, 23, 64, "contiguous", generator))
    at_zero = draw_weights("uniform", 1, 23, generator).to(device)
    at_zero[0, 7] = 0.0
    near_zero = at_zero.clone()
    near_zero[0, 7] = 1e-6
    grads = []
    for weights in (at_zero, near_zero):
        weights.requires_grad_()
        output = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
        grads.append(torch.autograd.grad(output.square().sum(), weights)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)
    assert grads[0][0, 7].abs() > 1e-4


def test_same_bits_twice(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for dtype in DTYPES:
        drawn = draw_heads(2, 3, 50, 72, "packed", generator)
        weights = draw_weights("mixed", 2, 50, generator).to(device).requires_grad_()
        leaves = [t.to(device, dtype).requires_grad_() for t in drawn] + [weights]
        runs = []
        for _ in range(2):
            output = tir_kernels.weighted_attention(*leaves, backend=backend)
            runs.append((output, *torch.autograd.grad(output.float().square().sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 64), (2, 0, 5, 64), (2, 2, 0, 64)])
def test_empty_batch(backend: str, device: str, shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, device=device, requires_grad=True)
    weights = torch.ones(shape[0], shape[2], device=device, requires_grad=True)
    output = tir_kernels.weighted_attention(q, q, q, weights, backend=backend)
    assert output.shape == shape
    output.sum().backward()
    assert q.grad.shape == shape
    assert (weights.grad == 0).all()


def test_one_token(backend: str, device: str) -> None:
    q, k, v = (torch.randn(2, 1, 1, 64, device=device) for _ in range(3))
    weights = torch.tensor([[3.0], [0.0]], device=device)
    output = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
    torch.testing.assert_close(output[0], v[0])
    assert (output[1] == 0).all()


@pytest.mark.slow
def test_long_row(backend: str, device: str, is_slow: bool) -> None:
    if is_slow:
        pytest.skip("too slow for 4096 tokens where a CPU plays the GPU")
    generator = torch.Generator().manual_seed(5)
    q, k, v = (t.to(device) for t in draw_heads(1, 1, 4096, 64, "packed", generator))
    check(q, k, v, draw_weights("mixed", 1, 4096, generator).to(device), backend, 0.125)


def test_large_scores_do_not_overflow(backend: str, device: str) -> None:
    generator = torch.Generator().manual_seed(6)
    q, k, v = (30 * t.to(device) for t in draw_heads(1, 1, 29, 64, "contiguous", generator))
    weights = draw_weights("mixed", 1, 29, generator).to(device)
    output = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
    exact, magnitudes = oracle.exact_attention(q, k, v, weights, 0.125, torch.ones_like(q))
    plain = oracle.plain_attention(q, k, v, weights, 0.125)
    oracle.assert_as_accurate("output", output, plain, exact[0], magnitudes[0])


def test_gradcheck_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(2, 2, 6, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    weights = (torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.1).requires_grad_()

    def attend(*inputs: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(*inputs, scale=0.7, backend="reference")

    assert torch.autograd.gradcheck(attend, (q, k, v, weights))
