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
# The lengths of usual models, and one query for a pool's.
LENGTHS = [(1, 1), (17, 17), (50, 50), (197, 197), (257, 257), (1, 197), (77, 50), (50, 100)]
# With so many multiprocessors no two heads are enough for blocks of whole heads.
TWO_PARTS, WHOLE_HEADS = (132, 160 * 1024), (1, 160 * 1024)

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


def with_nan_where_nothing_attends(inputs: AttentionInputs) -> AttentionInputs:
    ignored = inputs.weights <= 0
    key, value = inputs.key.clone(), inputs.value.clone()
    for b in range(len(ignored)):
        key[b, :, ignored[b]], value[b, :, ignored[b]] = math.nan, math.inf
    return inputs._replace(key=key, value=value)


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


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width", [64, 72])
def test_in_two_parts(kernels, width: int, sizes: tuple[int, int], is_causal: bool) -> None:
    kernels.set_device(*TWO_PARTS)
    for dtype in DTYPES:
        check(*draw(sizes, width, dtype, is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", LENGTHS, ids=str)
@pytest.mark.parametrize("width", [64, 72, 80, 96, 128])
def test_whole_heads(kernels, width: int, sizes: tuple[int, int], is_causal: bool) -> None:
    """A block has a head, where its warps can hold the keys."""
    kernels.set_device(*WHOLE_HEADS)
    for dtype in DTYPES[1:]:
        check(*draw(sizes, width, dtype, is_causal))


@pytest.mark.parametrize("sizes", [(256, 256), (272, 240), (33, 225)], ids=str)
def test_many_keys_of_a_block(kernels, sizes: tuple[int, int]) -> None:
    """As many as its warps hold; without one to spare; with warps that hold none."""
    kernels.set_device(*WHOLE_HEADS)
    assert is_whole(kernels, sizes, 64)
    check(*draw(sizes, 64, torch.bfloat16, False))


@pytest.mark.parametrize(
    ("width", "most"), [(64, 256), (72, 192), (80, 192), (96, 128), (112, 128), (128, 128)]
)
def test_which_heads_are_served_whole(kernels, width: int, most: int) -> None:
    """Those whose keys the warps hold, where there are enough heads and shared memory for one."""
    kernels.set_device(4, 160 * 1024)
    assert is_whole(kernels, (50, most), width)
    assert not is_whole(kernels, (50, most + 1), width)
    assert not is_whole(kernels, (273, most), width)
    assert not is_whole(kernels, (50, 50), width, dtype="float32")
    assert not is_whole(kernels, (50, 50), width, heads=1)
    kernels.set_device(4, 99 * 1024)
    assert is_whole(kernels, (50, 50), width)
    assert not is_whole(kernels, (50, most), width)


def is_whole(
    kernels, sizes: tuple[int, int], width: int, dtype: str = "bfloat16", heads: int = 2
) -> bool:
    return kernels.serves_whole_heads((1, heads, *sizes, width), dtype)


def test_odd_widths_and_unaligned_rows(kernels) -> None:
    kernels.set_device(*WHOLE_HEADS)
    for width in (20, 33):
        check(*draw((37, 50), width, torch.bfloat16, False))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("device", [TWO_PARTS, WHOLE_HEADS], ids=["two parts", "whole heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(
    kernels, dtype: torch.dtype, device: tuple[int, int], order: int
) -> None:
    kernels.set_device(*device)
    for is_causal in (False, True):
        problem = draw((70, 100), 64, dtype, is_causal, heads=2)
        kernels.set_thread_order(0)
        expected = gradients(*problem)
        kernels.set_thread_order(order)
        for ours, before in zip(gradients(*problem), expected, strict=True):
            assert torch.equal(ours, before)


def test_hidden_keys_are_not_looked_at(kernels) -> None:
    """What causality hides from all queries has no gradient, whatever it is."""
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


@pytest.mark.parametrize("device", [TWO_PARTS, WHOLE_HEADS], ids=["two parts", "whole heads"])
def test_nan_where_nothing_attends_stays_there(kernels, device: tuple[int, int]) -> None:
    kernels.set_device(*device)
    for dtype in DTYPES:
        inputs, grad_output = draw((40, 70), 64, dtype, False)
        expected = gradients(inputs, grad_output)[:3]
        found = gradients(with_nan_where_nothing_attends(inputs), grad_output)[:3]
        for ours, before in zip(found, expected, strict=True):
            assert torch.equal(ours, before)


def test_without_the_gradient_of_weights(kernels) -> None:
    inputs, grad_output = draw((50, 70), 64, torch.bfloat16, False)
    expected = gradients(inputs, grad_output)[:3]
    without = gradients(inputs, grad_output, wants=False)
    assert without[3].numel() == 0
    for ours, before in zip(without[:3], expected, strict=True):
        assert torch.equal(ours, before)
