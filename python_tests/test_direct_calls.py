"""Calls go past PyTorch's dispatcher where nobody looks, and through it where somebody does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tir_kernels
from tir_kernels.operators import library
from tir_kernels.operators import weighted_attention as module

Seen = list[str]


@pytest.fixture
def rows() -> list[Tensor]:
    return [torch.randn(1, 2, 5, 8) for _ in range(3)]


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The ways by which weighted attention is called from now on."""
    ways: Seen = []
    kind: Any = module._WeightedAttention
    monkeypatch.setattr(module._known_calls, "get", lambda key, tensors: None)

    def note(way: str, function: Callable) -> Callable:
        return lambda *inputs: ways.append(way) or function(*inputs)

    monkeypatch.setattr(kind, "_implementation", note("direct", kind._implementation))
    monkeypatch.setattr(kind, "forward", note("dispatcher", kind.forward))
    return ways


def test_plain_tensors_go_past_it(rows: list[Tensor], through: Seen) -> None:
    tir_kernels.weighted_attention(*rows)
    tir_kernels.weighted_attention(torch.nn.Parameter(rows[0], requires_grad=False), *rows[1:])
    with torch.inference_mode():
        tir_kernels.weighted_attention(*(t.clone() for t in rows))
    assert through == ["direct"] * 3


def test_gradients_are_those_of_the_dispatcher(
    rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for is_watched in (False, True):
        monkeypatch.setattr(library, "is_watched", lambda found=is_watched: found)
        leaves = [t.clone().requires_grad_() for t in rows]
        output = tir_kernels.weighted_attention(*leaves)
        assert "WeightedAttention" in output.grad_fn.name()
        results.append((output, *torch.autograd.grad(output.sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_dispatch_mode_sees_the_operator(rows: list[Tensor]) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: Seen = []
    rows[0].requires_grad_()
    with Watch():
        tir_kernels.weighted_attention(*rows).sum().backward()
    assert {"tir_kernels.weighted_attention.default"} <= set(seen)
    assert {"tir_kernels.weighted_attention_backward.default"} <= set(seen)


def test_a_function_mode_sees_the_operator(rows: list[Tensor]) -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: Seen = []
    with Watch():
        tir_kernels.weighted_attention(*rows)
    assert any("weighted_attention" in name for name in seen)


def test_a_profiler_sees_the_operator(rows: list[Tensor]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tir_kernels.weighted_attention(*rows)
    assert "tir_kernels::weighted_attention" in {event.key for event in profile.key_averages()}


def test_subclasses_and_lazy_views_go_through_it(rows: list[Tensor], through: Seen) -> None:
    class Own(Tensor):
        pass

    q, k, v = rows
    output = tir_kernels.weighted_attention(q.as_subclass(Own), k, v)
    assert isinstance(output, Own)
    negated = torch._neg_view(q)
    assert torch.equal(
        tir_kernels.weighted_attention(negated, k, v), tir_kernels.weighted_attention(-q, k, v)
    )
    assert through == ["dispatcher", "dispatcher", "direct"]


def test_a_tangent_is_refused_and_not_lost(rows: list[Tensor]) -> None:
    q, k, v = rows
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises((RuntimeError, NotImplementedError)):
            tir_kernels.weighted_attention(dual, k, v)


def test_without_the_question_for_keys_all_goes_through_it(
    rows: list[Tensor], through: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_keys_of", None)
    tir_kernels.weighted_attention(*rows)
    assert through == ["dispatcher"]
