"""The backward kernels, emulated, after the reference's forward pass: sizes, causality, weights."""

from __future__ import annotations

import math

import cuda_emulation
import oracle
import pytest
import torch
from torch import Tensor

from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs
from tir_kernels.backends.reference import ReferenceBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Lq, L: a row, a part of a tile, several chunks, more blocks of keys than of queries.
SIZES = [(1, 1), (17, 17), (1, 150), (50, 197), (150, 33), (300, 40), (40, 300)]
# The lengths of usual models, one query for a pool's, as many keys and queries as a block takes.
LENGTHS = [(1, 1), (17, 17), (50, 50), (197, 197), (1, 197), (77, 50), (50, 100), (384, 256)]
LONG = [(257, 257), (1, 289), (300, 384)]  # for a second sweep
# Multiprocessors that take all parts of two heads at once, and one that does not.
PARTS, HEADS = (132, 227 * 1024), (1, 227 * 1024)

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "runs"),
    pytest.mark.slow,
]


def draw(
    sizes: tuple[int, int], width: int, dtype: torch.dtype, is_causal: bool, heads: int = 1
) -> tuple[AttentionInputs, Tensor]:
    """A problem of two images, with weights that are 0 or negative among them, and grad_output."""
    num_queries, num_keys = sizes
    generator = torch.Generator().manual_seed(num_queries + 1000 * num_keys + width)
    q = torch.randn(2, num_queries, heads, width, generator=generator).to(dtype)
    packed = torch.randn(2, num_keys, 2, heads, width, generator=generator).to(dtype)
    k, v = packed.permute(2, 0, 3, 1, 4)
    weights = torch.rand(2, num_keys, generator=generator) * 2 + 0.01
    weights[:, 1::5] = 0.0
    weights[:, 3::7] = -1.0
    weights[1, : num_keys // 3] = 0.0  # so that the first queries may see nothing
    grad_output = torch.randn(2, num_queries, heads, width, generator=generator).to(dtype)
    inputs = AttentionInputs(q.transpose(1, 2), k, v, weights, width**-0.5, is_causal)
    return inputs, grad_output.transpose(1, 2)


def gradients(inputs: AttentionInputs, grad_output: Tensor, wants: bool = True) -> list[Tensor]:
    """Those of query, key, value and weights, behind a forward pass of the reference."""
    output, log_sum_exp = ReferenceBackend().attention_forward(inputs)
    backward = BackwardInputs(output, log_sum_exp, grad_output, wants)
    return list(cuda_emulation.register().attention_backward(inputs, backward))


def check(inputs: AttentionInputs, grad_output: Tensor) -> None:
    output = ReferenceBackend().attention_forward(inputs)[0]
    ours = (output, *gradients(inputs, grad_output))
    q, k, v, weights, scale, is_causal = inputs
    assert weights is not None
    oracle.assert_attention_as_accurate(ours, q, k, v, weights, scale, grad_output, is_causal)


def sweeps(kernels, inputs: AttentionInputs) -> int:
    """How often queries pass a block that has a whole head; 0 if heads are served in parts."""
    batch, heads, queries, width = inputs.query.shape
    shape = (batch, heads, queries, inputs.key.shape[2], width)
    dtype = str(inputs.query.dtype).removeprefix("torch.")
    return kernels.backward_sweeps(shape, dtype, inputs.is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width", [64, 72])
def test_sizes_in_parts(kernels, width: int, sizes: tuple[int, int], is_causal: bool) -> None:
    kernels.set_device(*PARTS)
    for dtype in DTYPES:
        problem = draw(sizes, width, dtype, is_causal)
        assert sweeps(kernels, problem[0]) == 0
        check(*problem)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [64, 72, 80])
def test_sizes_of_whole_heads(kernels, width: int, sizes: tuple[int, int], is_causal: bool) -> None:
    kernels.set_device(*HEADS)
    for dtype in DTYPES[1:]:
        # Of the shortest rows a block has so few that it takes more heads to be worth it.
        problem = draw(sizes, width, dtype, is_causal, heads=2 if max(sizes) < 32 else 1)
        assert sweeps(kernels, problem[0]) == 1
        check(*problem)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", LONG, ids=str)
@pytest.mark.parametrize("width", [64, 80])
def test_sizes_in_two_sweeps(kernels, width: int, sizes: tuple[int, int], is_causal: bool) -> None:
    kernels.set_device(*HEADS)
    for dtype in DTYPES[1:]:
        problem = draw(sizes, width, dtype, is_causal)
        assert sweeps(kernels, problem[0]) == 2
        check(*problem)


@pytest.mark.parametrize("width", [20, 33, 70])  # rows of whole pairs, and rows at odd addresses
@pytest.mark.parametrize("sizes", [(37, 50), (20, 260)], ids=str)
def test_whole_heads_that_are_not_aligned(kernels, sizes: tuple[int, int], width: int) -> None:
    kernels.set_device(*HEADS)
    problem = draw(sizes, width, torch.float16, False, heads=2)
    assert sweeps(kernels, problem[0]) == (1 if sizes[1] <= 256 else 2)
    check(*problem)


def test_which_heads_are_served_whole(kernels) -> None:
    """Those that fit, where one launch for all parts would not."""

    def found(sizes: tuple[int, int], width: int = 64, *, heads: int = 100, **options) -> int:
        options = {"type": "bfloat16", "is_causal": False} | options
        return kernels.backward_sweeps((1, heads, *sizes, width), **options)

    kernels.set_device(132, 227 * 1024)
    assert [found((197, n)) for n in (64, 256, 257, 384, 385)] == [1, 1, 2, 2, 0]
    assert [found((197, n), is_causal=True) for n in (256, 257, 385)] == [1, 2, 0]
    assert [found((n, 197)) for n in (384, 385)] == [1, 0]
    assert [found((197, 197), width) for width in (32, 65, 80, 81, 128)] == [1, 1, 1, 0, 0]
    assert [found((257, 257), width) for width in (64, 80)] == [2, 2]
    assert found((197, 197), type="float32") == 0
    # Two parts of keys and two of queries for each head, two of them on each multiprocessor.
    assert [found((197, 197), heads=heads) for heads in (66, 67)] == [0, 1]
    # A last head alone on a multiprocessor takes as long as one on each.
    assert [found((257, 257), 80, heads=heads) for heads in (60, 132, 140, 264)] == [0, 2, 0, 2]
    kernels.set_device(132, 99 * 1024)
    assert [found((197, n)) for n in (160, 161)] == [1, 0]
    kernels.set_device(108, 163 * 1024)
    assert [found((257, n), 80) for n in (256, 257)] == [1, 0]


WIDE = pytest.mark.parametrize("width", [64, 80])
ON_DEVICE = pytest.mark.parametrize("device", [PARTS, HEADS], ids=["parts", "whole heads"])


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@WIDE
@ON_DEVICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(
    kernels, dtype: torch.dtype, device: tuple[int, int], width: int, order: int
) -> None:
    kernels.set_device(*device)
    for sizes, is_causal in (((70, 100), False), ((70, 100), True), ((40, 260), False)):
        problem = draw(sizes, width, dtype, is_causal, heads=2)
        kernels.set_thread_order(0)
        expected = gradients(*problem)
        kernels.set_thread_order(order)
        for ours, before in zip(gradients(*problem), expected, strict=True):
            assert torch.equal(ours, before)


@WIDE
@ON_DEVICE
def test_what_nothing_attends_to_may_be_anything(
    kernels, device: tuple[int, int], width: int
) -> None:
    kernels.set_device(*device)
    for dtype, sizes in [*((dtype, (40, 70)) for dtype in DTYPES), (DTYPES[1], (40, 270))]:
        inputs, grad_output = draw(sizes, width, dtype, False)
        expected = gradients(inputs, grad_output)[:3]
        q, k, v, weights, scale, is_causal = inputs
        assert weights is not None
        ignored = (weights <= 0)[:, None, :, None]
        last_column = torch.arange(width) == width - 1
        every_other = (torch.arange(sizes[1]) % 2 == 0)[:, None]
        k = k.masked_fill(ignored & last_column, math.nan)
        v = v.masked_fill(ignored & every_other, math.inf)
        found = gradients(AttentionInputs(q, k, v, weights, scale, is_causal), grad_output)
        for ours, before in zip(found[:3], expected, strict=True):
            assert torch.equal(ours, before)
        assert found[3][weights == 0].isnan().all()


@ON_DEVICE
def test_without_any_weight_nothing_has_a_gradient(kernels, device: tuple[int, int]) -> None:
    kernels.set_device(*device)
    inputs, grad_output = draw((40, 70), 64, torch.bfloat16, False)
    for found in gradients(inputs._replace(weights=torch.zeros(2, 70)), grad_output):
        assert (found == 0).all()


@ON_DEVICE
def test_hidden_keys_are_not_looked_at(kernels, device: tuple[int, int]) -> None:
    """What causality hides from all queries has no gradient, whatever it is."""
    kernels.set_device(*device)
    for dtype in DTYPES:
        inputs, grad_output = draw((20, 150), 64, dtype, True)
        q, k, v, weights, scale, _ = inputs
        assert weights is not None
        visible = AttentionInputs(q, k[:, :, :20], v[:, :, :20], weights[:, :20], scale, True)
        expected = gradients(visible, grad_output)
        for ours, before in zip(gradients(inputs, grad_output), expected, strict=True):
            length = before.shape[2] if before.ndim > 2 else before.shape[1]
            dim = 2 if before.ndim > 2 else 1
            torch.testing.assert_close(ours.narrow(dim, 0, length), before)
            assert (ours.narrow(dim, length, ours.shape[dim] - length) == 0).all()


@ON_DEVICE
def test_without_the_gradient_of_weights(kernels, device: tuple[int, int]) -> None:
    kernels.set_device(*device)
    inputs, grad_output = draw((50, 70), 64, torch.bfloat16, False)
    expected = gradients(inputs, grad_output)[:3]
    without = gradients(inputs, grad_output, wants=False)
    assert without[3].numel() == 0
    for ours, before in zip(without[:3], expected, strict=True):
        assert torch.equal(ours, before)
