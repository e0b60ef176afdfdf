"""attention_statistics on every backend that runs here: accuracy, edge values, same bits."""

import math

import pytest
import statistics_oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import DTYPES, HEAD_WIDTHS, draw_heads, draw_weights, quick, random_heads, sizes
from torch import Tensor

import tir_kernels
from tir_kernels import AttentionStatistics, attention_statistics

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

NAMES = AttentionStatistics._fields


def draw(length: int, device: str = "cpu", layout: str = "packed") -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of 2 images, 2 heads of width 64, and weights, zero and negative too."""
    generator = torch.Generator().manual_seed(length)
    q, k, _ = draw_heads(2, 2, length, 64, layout, generator)
    return q.to(device), k.to(device), draw_weights("mixed", 2, length, generator).to(device)


def check(q: Tensor, k: Tensor, weights: Tensor | None, num_prefix_tokens: int, backend: str):
    scale = 0.9 * q.shape[3] ** -0.5
    found = attention_statistics(
        q, k, weights, num_prefix_tokens=num_prefix_tokens, scale=scale, backend=backend
    )
    assert all(t.shape == q.shape[:3] and t.is_contiguous() for t in found)
    statistics_oracle.assert_statistics_as_accurate(found, q, k, weights, num_prefix_tokens, scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_that_matter(backend: str, device: str, is_slow: bool, dtype: torch.dtype) -> None:
    for length in sizes(is_slow)[1]:
        q, k, weights = draw(length, device)
        for given_weights in (weights, None):
            check(q.to(dtype), k.to(dtype), given_weights, 5, backend)


@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_head_widths(backend: str, device: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    q, k, _ = draw_heads(1, 2, 33, width, "packed", generator)
    weights = draw_weights("uniform", 1, 33, generator).to(device)
    for dtype in DTYPES:
        check(q.to(device, dtype), k.to(device, dtype), weights, 1, backend)


@pytest.mark.slow
def test_random_shapes(backend: str, device: str, is_slow: bool) -> None:
    longest, _ = sizes(is_slow)

    @settings(quick, max_examples=12 if is_slow else 40)
    @given(
        **random_heads(longest),
        kind=st.sampled_from(["uniform", "mixed", "none", "empty row"]),
        prefix=st.sampled_from([0, 1, 5]) | st.integers(0, longest),
        seed=st.integers(0, 2**31),
    )
    def run(batch, heads, length, width, dtype, layout, kind, prefix, seed) -> None:
        generator = torch.Generator().manual_seed(seed)
        q, k, _ = draw_heads(batch, heads, length, width, layout, generator)
        weights = None
        if kind != "none":
            weights = draw_weights(kind, batch, length, generator).to(device)
        check(q.to(device, dtype), k.to(device, dtype), weights, min(prefix, length), backend)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows(backend: str, device: str, is_slow: bool, dtype: torch.dtype) -> None:
    if is_slow:
        pytest.skip("too slow for 4096 tokens where a CPU plays the GPU")
    generator = torch.Generator().manual_seed(5)
    q, k, _ = (t.to(device, dtype) for t in draw_heads(1, 1, 4096, 64, "packed", generator))
    check(q, k, draw_weights("mixed", 1, 4096, generator).to(device), 1, backend)


def test_large_scores_do_not_overflow(backend: str, device: str) -> None:
    q, k, weights = draw(29, device)
    check(30 * q, 30 * k, weights, 1, backend)
    found = attention_statistics(30 * q, 30 * k, weights, backend=backend)
    assert (found.entropy >= 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_of_any_size(backend: str, device: str, size: float) -> None:
    q, k, weights = draw(29, device)
    check(q, k, weights * size, 1, backend)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 19])
def test_a_mean_over_no_queries_is_zero(backend: str, device: str, num_prefix_tokens: int) -> None:
    q, k, weights = draw(19, device)
    found = attention_statistics(
        q, k, weights, num_prefix_tokens=num_prefix_tokens, backend=backend
    )
    counts = (num_prefix_tokens, 19 - num_prefix_tokens)
    for received, count in zip(found[:2], counts, strict=True):
        if count == 0:
            assert (received == 0).all()
        else:
            torch.testing.assert_close(received.sum(-1), torch.ones_like(received[..., 0]))


def test_equal_keys_share_attention_evenly(backend: str, device: str) -> None:
    q, k, _ = draw(32, device)
    found = attention_statistics(q, k[:, :, :1].expand(k.shape), backend=backend)
    for received in found[:2]:
        torch.testing.assert_close(received, torch.full_like(received, 1 / 32))
    torch.testing.assert_close(found.entropy, torch.full_like(found.entropy, math.log(32)))


def test_one_token(backend: str, device: str) -> None:
    q, k = (torch.randn(2, 1, 1, 64, device=device) for _ in range(2))
    weights = torch.tensor([[3.0], [0.0]], device=device)
    for prefix in (0, 1):
        found = attention_statistics(
            q, k, weights, num_prefix_tokens=prefix, scale=0.5, backend=backend
        )
        expected = [[1.0 - prefix], [0.0]]
        assert found.received_from_patches.flatten(1).tolist() == expected
        assert found.received_from_prefix.flatten(1).tolist() == [[float(prefix)], [0.0]]
        assert (found.entropy == 0).all()
        log_sum_exp = 0.5 * (q[0] * k[0]).sum(-1) + math.log(3.0)
        torch.testing.assert_close(found.log_sum_exp[0], log_sum_exp)
        assert (found.log_sum_exp[1] == -math.inf).all()


def test_queries_that_attend_to_nothing(backend: str, device: str) -> None:
    q, k, weights = draw(37, device)
    expected = attention_statistics(q[:1], k[:1], weights[:1], backend=backend)
    weights[1] = -weights[1].abs()
    found = attention_statistics(q, k, weights, backend=backend)
    for name, ours, other in zip(NAMES, found, expected, strict=True):
        assert torch.equal(ours[:1], other), name
        empty = torch.full_like(other, -math.inf if name == "log_sum_exp" else 0.0)
        assert torch.equal(ours[1:], empty), name


def test_weightless_keys_are_not_attended_to(backend: str, device: str) -> None:
    """Not even a NaN or infinity in such a key may show, nor one in a query show at such a key."""
    q, k, _ = draw(37, device)
    weights = torch.rand(2, 37, device=device) + 0.1
    weights[:, 5], weights[:, 20] = 0.0, -2.0
    kept = [n for n in range(37) if n not in (5, 20)]
    k = k.clone()
    k[:, :, 5], k[:, :, 20] = math.nan, math.inf
    found = attention_statistics(q, k, weights, backend=backend)
    check(q[:, :, kept], k[:, :, kept], weights[:, kept], 1, backend)
    assert all(t.isfinite().all() for t in found)
    q = q.clone()
    q[:, :, 3] = math.nan
    for results in (found, attention_statistics(q, k, weights, backend=backend)):
        for received in results[:2]:
            assert (received[..., [5, 20]] == 0).all()


def test_nan_is_not_hidden(backend: str, device: str) -> None:
    q, k, _ = draw(17, device)
    weights = torch.ones(2, 17, device=device)
    of_key, of_weight, of_query = k.clone(), weights.clone(), q.clone()
    of_key[0, :, 3, 5], of_weight[0, 3], of_query[0, :, 3, 5] = (math.nan,) * 3
    for found in (
        attention_statistics(q, of_key, weights, backend=backend),
        attention_statistics(q, k, of_weight, backend=backend),
    ):
        assert all(t[0].isnan().all() for t in found)
        assert all(t[1].isfinite().all() for t in found)
    # A query has one row of attention, in which every key takes part.
    found = attention_statistics(of_query, k, weights, backend=backend)
    assert found.received_from_prefix.isfinite().all()
    assert found.received_from_patches[0].isnan().all()
    others = [n for n in range(17) if n != 3]
    for of_queries in (found.entropy, found.log_sum_exp):
        assert of_queries[0, :, 3].isnan().all()
        assert of_queries[0, :, others].isfinite().all()


def test_same_bits_twice_and_without_weights(backend: str, device: str) -> None:
    for dtype in DTYPES:
        q, k, weights = draw(50, device)
        q, k = q.to(dtype), k.to(dtype)
        runs = [attention_statistics(q, k, weights, backend=backend) for _ in range(2)]
        plain = attention_statistics(q, k, backend=backend)
        ones = attention_statistics(q, k, torch.ones_like(weights), backend=backend)
        for name, one, other, unweighted, of_ones in zip(NAMES, *runs, plain, ones, strict=True):
            assert torch.equal(one, other), name
            assert torch.equal(unweighted, of_ones), name


def test_strides_change_no_bit(backend: str, device: str) -> None:
    for layout in ("packed", "sequence first", "padded"):
        q, k, weights = draw(50, device, layout)
        strided = attention_statistics(q, k, weights.mT.contiguous().mT, backend=backend)
        dense = attention_statistics(q.contiguous(), k.contiguous(), weights, backend=backend)
        assert all(torch.equal(one, other) for one, other in zip(strided, dense, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 64), (2, 0, 5, 64), (2, 2, 0, 64)])
def test_empty_batch(backend: str, device: str, shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, device=device)
    weights = torch.ones(shape[0], shape[2], device=device)
    found = attention_statistics(q, q, weights, num_prefix_tokens=0, backend=backend)
    assert [t.shape for t in found] == [shape[:3]] * 4


def test_statistics_have_no_gradient(backend: str, device: str) -> None:
    q, k, weights = draw(20, device)
    leaves = [t.detach().requires_grad_() for t in (q, k, weights)]
    found = attention_statistics(*leaves, backend=backend)
    assert not any(t.requires_grad for t in found)
    expected = attention_statistics(q, k, weights, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_opcheck(backend: str, device: str) -> None:
    q, k, weights = draw(20, device)
    operator = torch.ops.tir_kernels.attention_statistics.default
    for dtype in DTYPES[:2]:
        for given_weights in (weights, None):
            arguments = (q.to(dtype), k.to(dtype), given_weights, 0.1, 1, False, backend)
            torch.library.opcheck(operator, arguments)


@pytest.mark.slow
def test_compile_with_dynamic_length(backend: str, device: str) -> None:
    def total(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        found = attention_statistics(q, k, weights, num_prefix_tokens=2, backend=backend)
        output, log_sum_exp = tir_kernels.weighted_attention(
            q, k, q + k, weights, backend=backend, return_lse=True
        )
        return torch.stack([*found, log_sum_exp]) + output.sum(-1)

    torch.compiler.reset()
    graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend=count_graphs)
    for length in (20, 23, 31):
        q, k, weights = draw(length, device)
        weights = weights.abs() + 0.1
        arguments = [t.detach().requires_grad_() for t in (q, k, weights)]
        torch.testing.assert_close(compiled(*arguments), total(*arguments))
    assert graphs == 1, "a new length must not compile anew"


def test_export(backend: str, device: str) -> None:
    class Describe(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, weights: Tensor) -> AttentionStatistics:
            return attention_statistics(q, k, weights, backend=backend)

    arguments = draw(20, device)
    exported = torch.export.export(Describe(), arguments)
    for one, other in zip(exported.module()(*arguments), Describe()(*arguments), strict=True):
        assert torch.equal(one, other)


def test_autocast(backend: str, device: str) -> None:
    q, k, weights = draw(20, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = attention_statistics(q, k, weights, backend=backend)
    expected = attention_statistics(q.bfloat16(), k.bfloat16(), weights, backend=backend)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other), name
