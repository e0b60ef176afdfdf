"""Calls like one before are served as it was, and only they."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tir_kernels
from tir_kernels import JointSpace, WeightRule
from tir_kernels.operators import attending, choose, known_calls
from tir_kernels.operators import reweighted_attention as reweighted
from tir_kernels.operators import weighted_attention as module
from tir_kernels.operators.known_calls import KnownCalls


@pytest.fixture
def rows() -> list[Tensor]:
    return [torch.randn(1, 2, 5, 8) for _ in range(3)]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> KnownCalls:
    """What is known of calls from now on, of which nothing is yet."""
    if reason := choose.load_backend("cpu").unavailable():
        pytest.skip(f"backend cpu: {reason}")
    return forgotten(monkeypatch, module, "_known_calls")


def forgotten(monkeypatch: pytest.MonkeyPatch, owner: ModuleType, name: str) -> KnownCalls:
    """What is known there from now on, instead of what was."""
    found: KnownCalls = KnownCalls()
    monkeypatch.setattr(owner, name, found)
    return found


def launches(known: KnownCalls) -> int:
    return sum(map(len, known._known.values()))


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("weigh", [None, torch.rand])
def test_a_known_call_gives_the_same(
    known: KnownCalls, rows: list[Tensor], backend: str, weigh: Any
) -> None:
    weights = None if weigh is None else weigh(1, 5)
    others = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    for first, second in ((rows, others), (rows, rows)):
        for is_causal in (False, True):
            options = {"is_causal": is_causal, "backend": backend, "return_lse": True}
            tir_kernels.weighted_attention(*first, weights, **options)
            found = tir_kernels.weighted_attention(*second, weights, **options)
            expected = tir_kernels.weighted_attention(
                *second, weights, **(options | {"backend": "reference"})
            )
            torch.testing.assert_close(found, expected)
    assert launches(known) == 2


def test_a_known_call_has_gradients(known: KnownCalls, rows: list[Tensor]) -> None:
    weights = torch.rand(1, 5)
    tir_kernels.weighted_attention(*rows, weights)
    results = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (*rows, weights)]
        output = tir_kernels.weighted_attention(*leaves)
        assert "WeightedAttention" in output.grad_fn.name()
        results.append(torch.autograd.grad(output.square().sum(), leaves))
        with torch.no_grad():
            assert not tir_kernels.weighted_attention(*leaves).requires_grad
        known._known.clear()  # the second time it is none
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_is_almost_known_is_checked(known: KnownCalls, rows: list[Tensor]) -> None:
    q, k, v = rows
    tir_kernels.weighted_attention(q, k, v, is_causal=True, scale=1.0)
    with pytest.raises(TypeError, match="is_causal"):
        tir_kernels.weighted_attention(q, k, v, is_causal=1, scale=1.0)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="scale"):
        tir_kernels.weighted_attention(q, k, v, is_causal=True, scale=True)
    with pytest.raises(ValueError, match="attn_mask"):
        tir_kernels.weighted_attention(
            q,
            k,
            v,
            is_causal=True,
            scale=1.0,
            attn_mask=q,  # type: ignore[call-overload]
        )
    with pytest.raises(ValueError, match="k must have shape"):
        tir_kernels.weighted_attention(q, k[:, :, :, :4], v, is_causal=True, scale=1.0)
    strided = torch.randn(1, 2, 8, 5).mT
    with pytest.raises(ValueError, match="unit stride"):
        tir_kernels.weighted_attention(q, strided, v, is_causal=True, scale=1.0)
    with pytest.raises(TypeError, match="must be a tensor"):
        tir_kernels.weighted_attention(q, [1], v)  # type: ignore[call-overload]
    assert launches(known) == 1


def test_strides_and_types_tell_calls_apart(known: KnownCalls) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        dense = [torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3)]
        joined = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense]
        wide = torch.rand(5, 2).mT  # not contiguous: weights that are copied are not known
        for weights in (None, torch.rand(2, 5), wide):
            for _ in range(2):
                one = tir_kernels.weighted_attention(*dense, weights)
                other = tir_kernels.weighted_attention(*joined, weights)
                assert torch.equal(one, other)
                assert one.dtype == dtype
                assert not other.is_contiguous()
    assert launches(known) == 8


def test_surroundings_are_noticed(known: KnownCalls, rows: list[Tensor]) -> None:
    tir_kernels.weighted_attention(*rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert tir_kernels.weighted_attention(*rows).dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.vmap(tir_kernels.weighted_attention)(*(t[None] for t in rows))
    with torch.device("meta"):
        assert tir_kernels.weighted_attention(*rows).device.type == "cpu"
    assert launches(known) == 1


def test_a_backend_that_goes_is_noticed(
    known: KnownCalls, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tir_kernels.weighted_attention(*rows)
    monkeypatch.setattr(type(choose.load_backend("cpu")), "unavailable", lambda self: "it left")
    choose.forget_choices()
    with pytest.raises(RuntimeError, match="it left"):
        tir_kernels.weighted_attention(*rows, backend="cpu")
    torch.testing.assert_close(
        tir_kernels.weighted_attention(*rows),
        tir_kernels.weighted_attention(*rows, backend="reference"),
    )
    choose.forget_choices()


def test_no_tensor_is_held(known: KnownCalls, rows: list[Tensor]) -> None:
    weights = torch.rand(1, 5)
    tir_kernels.weighted_attention(*rows, weights)
    held = [weakref.ref(t) for t in (*rows, weights)]
    rows.clear()
    del weights
    assert [ref() for ref in held] == [None] * 4


def test_not_all_calls_are_remembered(known: KnownCalls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "_MOST", 3)
    monkeypatch.setattr(known_calls, "_MOST_ALIKE", 2)
    for length, causal, scale in itertools.product(range(1, 9), (False, True), (1.0, 2.0, 3.0)):
        rows = [torch.randn(1, 1, length, 4) for _ in range(3)]
        found = [
            tir_kernels.weighted_attention(*rows, is_causal=causal, scale=scale) for _ in range(2)
        ]
        assert torch.equal(*found)
        assert 1 <= len(known._known) <= 3
        assert 1 <= launches(known) <= 6


def test_without_a_comparison_of_tensors_nothing_is_known(
    known: KnownCalls, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    known_compare = known_calls._comparison_of_the_compiler()
    assert known_compare is not None, "this PyTorch compares otherwise; each call is checked anew"
    blind = lambda *tensors, **sizes: SimpleNamespace(check=lambda *others: True)  # noqa: E731
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", blind)
    compare = known_calls._comparison_of_the_compiler()
    assert compare is None
    monkeypatch.setattr(known_calls, "_comparison", compare)
    one, other = (tir_kernels.weighted_attention(*rows) for _ in range(2))
    assert torch.equal(one, other)
    assert launches(known) == 0


@pytest.fixture
def known_selections(known: KnownCalls, monkeypatch: pytest.MonkeyPatch) -> KnownCalls:
    """What is known of calls that select tokens from now on."""
    return forgotten(monkeypatch, reweighted, "_known_calls")


def test_a_known_selection_gives_the_same(known_selections: KnownCalls, rows: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    spaces = [None, JointSpace(make(16), make(16), 1e-5, make(16, 12)), JointSpace(norm_eps=1e-6)]
    rules = [WeightRule(), WeightRule(top_ratio=0.5), WeightRule("suppress")]
    count = 0
    for space, rule, table in itertools.product(spaces, rules, (None, make(5))):
        width = 16 if space is None or space.proj is None else 12
        for classes in (make(4, width), make(1, 4, width)):
            count += 1
            for _ in range(2):
                arguments = (*rows, make(1, 5, 16), classes)
                options = {"joint_space": space, "rule": rule, "table": table, "backend": "cpu"}
                options |= {"return_weights": True, "return_lse": True}
                found = tir_kernels.reweighted_attention(*arguments, **options)
                with watched():
                    expected = tir_kernels.reweighted_attention(*arguments, **options)
                flat = [found[0], *found[1], found[2]], [expected[0], *expected[1], expected[2]]
                assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
                options |= {"return_weights": False, "return_counts": True, "return_lse": False}
                output, counts = tir_kernels.reweighted_attention(*arguments, **options)
                assert torch.equal(output, found[0])
                assert torch.equal(counts, found[1].counts)
    assert launches(known_selections) == count


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["classes", "norm_weight", "norm_bias", "proj", "table"])
def test_what_is_converted_is_converted_every_time(
    known_selections: KnownCalls, rows: list[Tensor], name: str, dtype: torch.dtype
) -> None:
    def call(seed: int, learns: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"norm_weight": (16,), "norm_bias": (16,), "proj": (16, 12), "classes": (3, 12)}
        made = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        made["table"] = torch.rand(4, generator=generator)
        made[name] = made[name].to(dtype)
        classes, table = made.pop("classes"), made.pop("table").requires_grad_(learns)
        tokens = torch.randn(1, 5, 16, generator=generator)
        found = tir_kernels.reweighted_attention(
            *rows,
            tokens,
            classes,
            joint_space=JointSpace(**made, norm_eps=1e-5),
            table=table,
            return_counts=True,
        )
        return [each.detach() for each in (*found, *_gradients(found[0], table))]

    for seed, learns in itertools.product(range(3), (False, True)):
        with watched():
            expected = call(seed, learns)
        for one, other in zip(call(seed, learns), expected, strict=True):
            assert torch.equal(one, other)


def _gradients(output: Tensor, leaf: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.square().sum(), leaf) if leaf.requires_grad else ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_known_selection_takes_16_bits(known_selections: KnownCalls, dtype: torch.dtype) -> None:
    rows = [torch.randn(2, 2, 9, 8).to(dtype) for _ in range(3)]
    space = JointSpace(*(torch.randn(16).to(dtype) for _ in range(2)), 1e-5)
    options = {"joint_space": space, "return_weights": True, "backend": "cpu"}
    for _ in range(2):
        arguments = (*rows, torch.randn(2, 9, 16).to(dtype), torch.randn(4, 16).to(dtype))
        output, weights = tir_kernels.reweighted_attention(*arguments, **options)
        with watched():
            expected, expected_weights = tir_kernels.reweighted_attention(*arguments, **options)
        assert torch.equal(output, expected)
        assert torch.equal(weights.weights, expected_weights.weights)
    assert launches(known_selections) == 1


def test_a_known_selection_has_gradients(known_selections: KnownCalls, rows: list[Tensor]) -> None:
    tokens, classes, table = torch.randn(1, 5, 16), torch.randn(3, 16), torch.rand(4)
    tir_kernels.reweighted_attention(*rows, tokens, classes, table=table)

    def results(own_table: Tensor | None) -> list[Tensor]:
        heads = [t.clone().requires_grad_() for t in rows]
        output, counts, log_sum_exp = tir_kernels.reweighted_attention(
            *heads, tokens, classes, table=own_table, return_counts=True, return_lse=True
        )
        assert output.grad_fn.name() == "ReweightedAttentionBackward"
        assert not counts.requires_grad
        assert not log_sum_exp.requires_grad
        leaves = heads + [t for t in (own_table,) if t is not None and t.requires_grad]
        return [output, counts, log_sum_exp, *torch.autograd.grad(output.square().sum(), leaves)]

    for own_table in (table.clone().requires_grad_(), table, None):
        with watched():
            expected = results(own_table)
        for _ in range(2):  # the second time it is known in any case
            for one, other in zip(results(own_table), expected, strict=True):
                assert torch.equal(one, other)
    assert launches(known_selections) == 4  # tensors that want gradients are known by themselves
    learned = tokens.clone().requires_grad_()  # which receives none
    assert not tir_kernels.reweighted_attention(*rows, learned, classes, table=table).requires_grad
    assert launches(known_selections) == 5


@pytest.fixture
def known_gradients(known: KnownCalls, monkeypatch: pytest.MonkeyPatch) -> KnownCalls:
    """What is known of backward passes from now on."""
    return forgotten(monkeypatch, attending, "_known_gradients")


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("wants_table", [False, True])
@pytest.mark.parametrize("operator", ["weighted", "unweighted", "reweighted"])
def test_known_gradients_are_the_same(
    known_gradients: KnownCalls, operator: str, wants_table: bool, is_packed: bool
) -> None:
    tokens, classes = torch.randn(2, 7, 16), torch.randn(3, 16)

    def results(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randn(2, 7, 3, 2, 8, generator=generator)
        if not is_packed:
            packed = packed.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
        heads = [each.transpose(1, 2) for each in packed.requires_grad_().unbind(2)]
        table = torch.rand(4, generator=generator).requires_grad_(wants_table)
        weights = torch.rand(2, 7, generator=generator).requires_grad_(wants_table)
        if operator == "reweighted":
            output = tir_kernels.reweighted_attention(*heads, tokens, classes, table=table)
        else:
            weights_or_none = weights if operator == "weighted" else None
            output = tir_kernels.weighted_attention(*heads, weights_or_none, is_causal=True)
        grad = torch.randn(output.shape, generator=generator)
        leaf = table if operator == "reweighted" else weights
        leaves = [packed, leaf] if wants_table and operator != "unweighted" else [packed]
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    for seed in range(3):  # from the second time on it is known
        with watched():
            expected = results(seed)
        for one, other in zip(results(seed), expected, strict=True):
            assert torch.equal(one, other)
        assert launches(known_gradients) == 1


def test_gradients_that_would_be_copied_are_not_known(
    known_gradients: KnownCalls, rows: list[Tensor]
) -> None:
    leaves = [each.requires_grad_() for each in rows]
    found = []
    for grad in (torch.ones(8, 5, 2, 1).permute(3, 2, 1, 0), torch.ones(()).expand(1, 2, 5, 8)):
        for _ in range(2):
            output = tir_kernels.weighted_attention(*leaves)
            found.append(torch.autograd.grad(output, leaves, grad))
    assert all(
        torch.equal(*each) for other in found[1:] for each in zip(found[0], other, strict=True)
    )
    assert launches(known_gradients) == 0
    output = tir_kernels.weighted_attention(*leaves, backend="reference")  # has none to remember
    for one, other in zip(
        torch.autograd.grad(output, leaves, torch.ones_like(output)), found[0], strict=True
    ):
        torch.testing.assert_close(one, other)
    assert launches(known_gradients) == 0


def test_a_backend_that_goes_serves_no_gradients(
    known_gradients: KnownCalls, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [each.requires_grad_() for each in rows]
    grad = torch.randn(rows[0].shape)

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, leaves, grad)

    expected = gradients(tir_kernels.weighted_attention(*leaves))
    assert launches(known_gradients) == 1
    output = tir_kernels.weighted_attention(*leaves)
    monkeypatch.setattr(type(choose.load_backend("cpu")), "unavailable", lambda self: "it left")
    choose.forget_choices()
    found = gradients(output)
    assert not all(torch.equal(*each) for each in zip(found, expected, strict=True))  # by another
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    choose.forget_choices()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """A region in which calls go through the dispatcher."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watch():
        yield
