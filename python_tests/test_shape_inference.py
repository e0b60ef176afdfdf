"""Every operator on tensors without data: meta tensors, fake ones, and PyTorch's FLOP counter."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import tir_kernels
from tir_kernels import JointSpace
from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.operators.dropout import philox_dropout

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


def call_everything(backend: str, dtype: torch.dtype = torch.float32, **place: Any) -> list[Tensor]:
    """Results of every public function, and gradients of all that learns."""

    def make(*shape: int, learns: bool = False) -> Tensor:
        return torch.rand(shape, **place).to(dtype).requires_grad_(learns)

    q, k, v = (make(2, 3, 10, 16, learns=True) for _ in range(3))
    weights, table, rows = make(2, 10, learns=True), make(6, learns=True), make(2, 3, 4, 8)
    tokens, classes = make(2, 10, 32, learns=True), make(5, 12)
    space = JointSpace(make(32), make(32), 1e-5, make(32, 12))
    relevant = {"joint_space": space, "backend": backend}
    seeds = torch.zeros(2, dtype=torch.int64, **place)
    step = torch.zeros(1, dtype=torch.int64, **place)
    hidden = make(4, 8, learns=True)
    token_weights = tir_kernels.token_weights(tokens, classes, table=table, **relevant)
    results = [
        *token_weights,
        tir_kernels.token_weights(tokens, classes, **relevant).weights,
        tir_kernels.token_relevance(tokens, classes, **relevant),
        tir_kernels.reweight_tokens(tokens, token_weights.weights),
        tir_kernels.weighted_attention(q, k, v, weights, backend=backend),
        *tir_kernels.weighted_attention(q, k, v, weights, backend=backend, return_lse=True),
        *tir_kernels.attention_statistics(q, k, weights, backend=backend),
        tir_kernels.reweighted_attention(q, k, v, tokens, classes, **relevant),
        tir_kernels.reweighted_attention(
            q, k, v, tokens, classes, table=table, return_weights=True, **relevant
        )[0],
        philox_dropout(rows, seeds, step, num_branches=2),
        bias_activation(hidden, make(8)),
    ]
    leaves = (q, k, v, weights, table, tokens, hidden)
    total = torch.stack([r.float().sum() for r in results if r.requires_grad]).sum()
    return results + list(torch.autograd.grad(total, leaves))


def described(tensors: list[Tensor]) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_meta_tensors(backend: str, dtype: torch.dtype) -> None:
    """They need no backend that runs here, and say what real tensors would."""
    found = call_everything(backend, dtype, device="meta")
    assert all(tensor.is_meta for tensor in found)
    assert described(found) == described(call_everything("auto", dtype))


def test_in_the_context_of_the_meta_device() -> None:
    with torch.device("meta"):
        found = call_everything("auto")
    assert all(tensor.is_meta for tensor in found)
    assert described(found) == described(call_everything("auto"))


@pytest.mark.parametrize("make_region", [nullcontext, lambda: torch.autocast("cpu")])
def test_meta_tensors_are_cast_by_no_autocast_region(make_region: Callable) -> None:
    with make_region():
        q = torch.empty(1, 2, 6, 8, device="meta")
        weights = torch.empty(1, 6, device="meta")
        assert tir_kernels.weighted_attention(q, q, q, weights).dtype == torch.float32


def test_fake_tensors_before_and_after_real_ones() -> None:
    expected = described(call_everything("auto"))
    with FakeTensorMode():
        assert described(call_everything("auto")) == expected
    assert described(call_everything("auto")) == expected


def test_checks_are_the_same() -> None:
    q = torch.empty(1, 2, 6, 8, device="meta")
    with pytest.raises(ValueError, match=r"^weights must have shape"):
        tir_kernels.weighted_attention(q, q, q, torch.empty(1, 5, device="meta"))
    with pytest.raises(ValueError, match=r"^weights must be on the device of q, meta"):
        tir_kernels.weighted_attention(q, q, q, torch.empty(1, 6))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_counted(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    import tir_kernels.flops

    q = torch.randn(2, 3, 10, 16, device=device, requires_grad=True)
    k, v = (torch.randn(2, 3, 10, 16, device=device) for _ in range(2))
    tokens, classes = torch.randn(2, 10, 32, device=device), torch.randn(5, 12, device=device)
    space = JointSpace(proj=torch.randn(32, 12, device=device))
    product = 2 * (2 * 3) * 10 * 16 * 10  # of L x d and d x L, for all heads
    relevance = 2 * 2 * 9 * 32 * 12 + 2 * 2 * 9 * 12 * 5

    def count(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    def attend() -> Tensor:
        return tir_kernels.weighted_attention(q, k, v, torch.ones(2, 10, device=device))

    def reweight() -> Tensor:
        return tir_kernels.reweighted_attention(q, k, v, tokens, classes, joint_space=space)

    assert count(attend) == 2 * product
    assert count(lambda: tir_kernels.attention_statistics(q, k)) == 2 * product
    assert count(lambda: attend().sum().backward()) == 7 * product
    assert count(reweight) == relevance + 2 * product
    assert count(lambda: reweight().sum().backward()) == relevance + 7 * product
    for function in (tir_kernels.token_relevance, tir_kernels.token_weights):
        assert count(lambda f=function: f(tokens, classes, joint_space=space)) == relevance
    assert count(lambda: tir_kernels.token_relevance(tokens, tokens[0])) == 2 * 2 * 9 * 32 * 10


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_flop_counter_takes_every_operator(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        call_everything("auto", device=device)
