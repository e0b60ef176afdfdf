"""The backward kernels, emulated, after the reference's forward pass: sizes, causality, weights."""

from __future__ import annotations

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


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("width", [64, 72])
def test_against_float64(kernels, width: int, sizes: tuple[int, int], is_causal: bool) -> None:
    for dtype in DTYPES:
        check(*draw(sizes, width, dtype, is_causal))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_threads_does_not_matter(kernels, dtype: torch.dtype, order: int) -> None:
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


def test_without_the_gradient_of_weights(kernels) -> None:
    inputs, grad_output = draw((50, 70), 64, torch.bfloat16, False)
    expected = gradients(inputs, grad_output)[:3]
    without = gradients(inputs, grad_output, wants=False)
    assert without[3].numel() == 0
    for ours, before in zip(without[:3], expected, strict=True):
        assert torch.equal(ours, before)
