"""Attention of other numbers of queries than keys, and of queries that see no later key."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators.choose import load_backend

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = [(1, 37), (37, 37), (70, 33), (33, 70), (3, 1), (17, 197)]  # Lq, L
LONG = [(197, 257), (577, 577), (64, 800), (1, 577), (800, 65)]


def draw(
    num_queries: int, num_keys: int, width: int, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k and v, with k and v views of one projection; weights; and a gradient of the output."""
    generator = torch.Generator().manual_seed(num_queries + 1000 * num_keys)
    q = torch.randn(3, num_queries, 2, width, generator=generator).to(device, dtype)
    packed = torch.randn(3, num_keys, 2, 2, width, generator=generator).to(device, dtype)
    k, v = packed.permute(2, 0, 3, 1, 4)
    weights = torch.rand(3, num_keys, generator=generator) * 2 + 0.01
    weights[:, 1::5] = 0
    weights[:, 3::7] = -1
    weights[1:2, : max(1, num_keys // 3)] = 0  # so that the first queries may see nothing
    weights[2:3] = 0
    grad_output = torch.randn(3, 2, num_queries, width, generator=generator)
    return [q.transpose(1, 2), k, v], weights.to(device), grad_output.to(device, dtype)


def visible(num_queries: int, num_keys: int, is_causal: bool) -> Tensor:
    """(Lq, L) of the keys that a query may see."""
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool)
    return everything.tril() if is_causal else everything


def check(backend: str, device: str, shape: tuple[int, int], width: int, is_causal: bool) -> None:
    scale = width**-0.5
    for dtype in DTYPES:
        rows, weights, grad_output = draw(*shape, width, dtype, device)
        leaves = [t.detach().requires_grad_() for t in (*rows, weights)]
        output, lse = tir_kernels.weighted_attention(
            *leaves, is_causal=is_causal, backend=backend, return_lse=True
        )
        ours = (output.detach(), *torch.autograd.grad(output, leaves, grad_output))
        oracle.assert_attention_as_accurate(ours, *rows, weights, scale, grad_output, is_causal)
        doubles = AttentionInputs(
            *(t.double() for t in (*rows, weights)), scale=scale, is_causal=is_causal
        )
        exact_lse = oracle.REFERENCE.attention_forward(doubles)[1]
        torch.testing.assert_close(lse.double(), exact_lse, atol=2e-5, rtol=2e-6)
        assert (output[exact_lse.isneginf()] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", LENGTHS, ids=str)
def test_against_float64(
    backend: str, device: str, shape: tuple[int, int], is_causal: bool
) -> None:
    check(backend, device, shape, 24, is_causal)


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_long_ones(
    backend: str, device: str, is_slow: bool, shape: tuple[int, int], is_causal: bool
) -> None:
    if is_slow and max(shape) > 300:
        pytest.skip("a CPU plays the GPU")
    check(backend, device, shape, 64, is_causal)


def test_the_reference_against_pytorch() -> None:
    for shape in LENGTHS:
        rows, _, _ = draw(*shape, 8, torch.float64, "cpu")
        for is_causal in (False, True):
            expected = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=is_causal)
            ours = tir_kernels.weighted_attention(*rows, is_causal=is_causal)
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_of_the_reference(is_causal: bool) -> None:
    rows, weights, _ = draw(4, 6, 3, torch.float64, "cpu")
    weights = (weights.double().abs() + 0.1).requires_grad_()
    leaves = [t.detach().requires_grad_() for t in rows]

    def attend(*inputs: Tensor) -> Tensor:
        return tir_kernels.weighted_attention(*inputs, is_causal=is_causal, backend="reference")

    assert torch.autograd.gradcheck(attend, (*leaves, weights))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", LENGTHS, ids=str)
def test_statistics(backend: str, device: str, shape: tuple[int, int], is_causal: bool) -> None:
    (q, k, _), weights, _ = draw(*shape, 24, torch.float32, device)
    prefix = min(2, shape[0])
    options = {"num_prefix_tokens": prefix, "is_causal": is_causal}
    found = tir_kernels.attention_statistics(q, k, weights, backend=backend, **options)
    mask = visible(*shape, is_causal).to(device)
    scores = q.double() @ k.double().mT * 24**-0.5
    scores = scores + weights.double().clamp(min=0).log()[:, None, None]
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    attention = (scores - lse[..., None]).exp().nan_to_num(0.0)
    expected = (
        attention[:, :, :prefix].mean(2),
        attention[:, :, prefix:].sum(2) / max(1, shape[0] - prefix),
        torch.special.entr(attention).sum(-1),
        lse,
    )
    for name, ours, exact in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5, msg=name)


def test_one_query_is_that_of_all(backend: str, device: str) -> None:
    rows, weights, _ = draw(37, 37, 24, torch.float32, device)
    q, k, v = rows
    whole = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
    first = tir_kernels.weighted_attention(q[:, :, :1], k, v, weights, backend=backend)
    torch.testing.assert_close(first, whole[:, :, :1])


def test_a_causal_row_is_that_without_the_later_keys(backend: str, device: str) -> None:
    (q, k, v), weights, _ = draw(20, 30, 24, torch.float32, device)
    whole = tir_kernels.weighted_attention(q, k, v, weights, is_causal=True, backend=backend)
    for i in (0, 7, 19):
        parts = (q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], weights[:, : i + 1])
        row = tir_kernels.weighted_attention(*parts, backend=backend)
        torch.testing.assert_close(whole[:, :, i : i + 1], row)


def test_reweighted_attention_of_few_queries(backend: str, device: str) -> None:
    rows, _, grad_output = draw(1, 37, 24, torch.float32, device)
    tokens, classes = torch.randn(3, 37, 16), torch.randn(5, 16)
    tokens, classes = tokens.to(device), classes.to(device)
    table = torch.rand(6).to(device).requires_grad_()
    leaves = [t.detach().requires_grad_() for t in rows]
    options = {"table": table, "num_prefix_tokens": 2, "backend": backend}
    ours = tir_kernels.reweighted_attention(*leaves, tokens, classes, **options)
    weights = tir_kernels.token_weights(tokens, classes, **options).weights
    expected = tir_kernels.weighted_attention(*leaves, weights, backend=backend)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(
        torch.autograd.grad(ours, [*leaves, table], grad_output),
        torch.autograd.grad(expected, [*leaves, table], grad_output),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "shape", [(0, 2, 5, 7, 8), (2, 2, 0, 7, 8), (2, 2, 5, 0, 8), (2, 2, 5, 7, 0)]
)
def test_empty_ones(shape: tuple[int, ...]) -> None:
    batch, heads, num_queries, num_keys, width = shape
    q = torch.randn(batch, heads, num_queries, width, requires_grad=True)
    k = torch.randn(batch, heads, num_keys, width, requires_grad=True)
    weights = torch.rand(batch, num_keys, requires_grad=True)
    output = tir_kernels.weighted_attention(q, k, k, weights)
    assert output.shape == q.shape
    assert (output == 0).all()
    for grad in torch.autograd.grad(output.sum(), (q, k, weights)):
        assert (grad == 0).all()


def test_shapes_on_meta() -> None:
    q = torch.empty(2, 3, 5, 8, device="meta", requires_grad=True)
    k = torch.empty(2, 3, 7, 8, device="meta", requires_grad=True)
    weights = torch.empty(2, 7, device="meta", requires_grad=True)
    output, lse = tir_kernels.weighted_attention(q, k, k, weights, return_lse=True)
    grads = torch.autograd.grad(output.sum(), (q, k, weights))
    assert output.shape == q.shape
    assert lse.shape == (2, 3, 5)
    assert [g.shape for g in grads] == [q.shape, k.shape, weights.shape]
    found = tir_kernels.attention_statistics(q, k, num_prefix_tokens=5)
    assert [each.shape[2] for each in found] == [7, 7, 5, 5]


def test_opcheck(backend: str, device: str) -> None:
    ops = torch.ops.tir_kernels
    (q, k, v), weights, grad_output = draw(5, 9, 16, torch.float32, device)
    given = (q, k, v, weights, 0.1, True, backend)
    output, lse = ops.weighted_attention(*given)
    torch.library.opcheck(ops.weighted_attention.default, given)
    saved = (q, k, v, weights, output, lse, 0.1, True, True, False, backend)
    torch.library.opcheck(ops.weighted_attention_backward.default, (grad_output, *saved))


def test_no_key_is_read_in_a_wrong_place(backend: str, device: str) -> None:
    """Queries longer than keys: each reads the keys of its own image and head."""
    (q, k, v), weights, _ = draw(70, 33, 24, torch.float32, device)
    whole = tir_kernels.weighted_attention(q, k, v, weights, backend=backend)
    for b in range(3):
        for h in range(2):
            alone = tir_kernels.weighted_attention(
                *(t[b : b + 1, h : h + 1] for t in (q, k, v)), weights[b : b + 1], backend=backend
            )
            assert torch.equal(alone[0, 0], whole[b, h])


def test_lengths_of_the_backend_s_results(backend: str, device: str) -> None:
    (q, k, v), weights, grad_output = draw(5, 9, 16, torch.float32, device)
    inputs = AttentionInputs(q, k, v, weights, 0.25)
    results = oracle.run_attention(load_backend(backend), inputs, grad_output)
    expected = [q.shape, (3, 2, 5), q.shape, k.shape, v.shape, weights.shape]
    assert [tuple(each.shape) for each in results] == [tuple(shape) for shape in expected]
