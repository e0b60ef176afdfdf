"""Results lie in memory as their inputs do, so that models need not copy them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tir_kernels
from tir_kernels import JointSpace
from tir_kernels.backends.common import are_packed
from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs
from tir_kernels.backends.reference import ReferenceBackend
from tir_kernels.operators.choose import register_backend
from tir_kernels.towers.attention import join_heads, split_heads

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

OPS = torch.ops.tir_kernels
B, H, L, D = 2, 3, 21, 16
JOINED = (L * H * D, D, H * D, 1)  # strides of (B, H, L, d) in the memory of (B, L, H, d)


def draw(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def packed(device: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A projection (B, L, 3 H d) that learns, and query, key and value of it."""
    projected = draw(device, B, L, 3 * H * D).requires_grad_()
    return projected, split_heads(projected, H, slice(0, 3))


class Copies(TorchDispatchMode):
    """Notes the operators that copy rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("cat", "stack", "clone", "copy_", "_to_copy", "contiguous", "slice_backward"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def by_weights(rows: tuple[Tensor, ...], backend: str) -> Tensor:
    weights = torch.linspace(0, 2, B * L, device=rows[0].device).view(B, L)
    return tir_kernels.weighted_attention(*rows, weights, backend=backend)


def by_classes(rows: tuple[Tensor, ...], backend: str) -> Tensor:
    device = rows[0].device.type
    space = JointSpace(None, None, 1e-5, draw(device, 32, 12))
    tokens, classes = draw(device, B, L, 32), draw(device, 5, 12)
    return tir_kernels.reweighted_attention(
        *rows, tokens, classes, joint_space=space, backend=backend
    )


@pytest.mark.parametrize("attend", [by_weights, by_classes])
def test_nothing_is_copied_around_attention(backend: str, device: str, attend: Any) -> None:
    projected, rows = packed(device)
    grad = draw(device, B, L, H * D)
    with Copies() as copies:
        attended = attend(rows, backend)
        joined = join_heads(attended)
        assert joined.data_ptr() == attended.data_ptr()
        joined.backward(grad)
    assert attended.stride() == JOINED
    if backend != "reference":
        assert copies.seen == []

    apart = [part.detach().contiguous().requires_grad_() for part in rows]
    other = attend(tuple(apart), backend)
    assert other.is_contiguous()
    assert torch.equal(other, attended)
    other.backward(grad.view(B, L, H, D).transpose(1, 2))
    assert all(part.grad.is_contiguous() for part in apart)
    expected = torch.cat([join_heads(part.grad) for part in apart], -1)
    assert torch.equal(projected.grad, expected)


def test_gradients_lie_as_their_inputs(backend: str, device: str) -> None:
    """Of other lengths, and of inputs that are slices of a tensor of their own."""
    query = draw(device, B, 5, H, D).transpose(1, 2).requires_grad_()
    key = draw(device, B, H, L, D).requires_grad_()
    value = draw(device, B, L, 2, H, D)[:, :, 1].transpose(1, 2).requires_grad_()
    output = tir_kernels.weighted_attention(query, key, value, backend=backend)
    grads = torch.autograd.grad(output, (query, key, value), torch.ones_like(output))
    assert output.stride() == (5 * H * D, D, H * D, 1)
    assert grads[0].stride() == output.stride()
    assert grads[1].is_contiguous()
    assert grads[2].stride() == JOINED


def test_one_head_or_row_lies_as_ever(backend: str, device: str) -> None:
    for shape in ((2, 7, 1, 8), (2, 1, 3, 8)):
        rows = [draw(device, *shape).transpose(1, 2).requires_grad_() for _ in range(3)]
        output = tir_kernels.weighted_attention(*rows, backend=backend)
        assert output.is_contiguous()
        assert all(g.is_contiguous() for g in torch.autograd.grad(output.sum(), rows))


def test_opcheck(backend: str, device: str) -> None:
    query, key, value = (each.detach() for each in packed(device)[1])
    assert are_packed(query, key, value)
    given = (query, key, value, None, 0.25, False, backend)
    output, log_sum_exp = OPS.weighted_attention(*given)
    torch.library.opcheck(OPS.weighted_attention.default, given)
    saved = (output, query, key, value, None, output, log_sum_exp, 0.25, False, False)
    torch.library.opcheck(OPS.weighted_attention_backward.default, (*saved, False, backend))
    grads = OPS.weighted_attention_backward(*saved, True, backend)
    assert are_packed(*grads[:3])


@pytest.mark.slow
def test_compiled(backend: str, device: str) -> None:
    def attend(projected: Tensor) -> Tensor:
        rows = split_heads(projected, H, slice(0, 3))
        return join_heads(tir_kernels.weighted_attention(*rows, backend=backend))

    projected, _ = packed(device)
    expected = torch.autograd.grad(attend(projected).square().sum(), projected)
    for compiler in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend=compiler, fullgraph=True)
        found = torch.autograd.grad(compiled(projected).square().sum(), projected)
        torch.testing.assert_close(found, expected)


class Foreign(ReferenceBackend):
    """Lays everything out as it likes."""

    name = "foreign-layouts"

    def attention_forward(self, inputs: AttentionInputs) -> Any:
        output, log_sum_exp = ReferenceBackend.attention_forward(inputs)
        return output.contiguous(), log_sum_exp

    def attention_backward(self, inputs: AttentionInputs, backward: BackwardInputs) -> Any:
        grads = ReferenceBackend.attention_backward(inputs, backward)
        return [grad.contiguous() for grad in grads]


def test_a_backend_may_lay_out_results_as_it_likes() -> None:
    register_backend(Foreign.name, "test_layouts:Foreign")
    results = []
    for backend in ("reference", Foreign.name):
        projected, rows = packed("cpu")
        attended = by_weights(rows, backend)
        attended.square().sum().backward()
        assert attended.stride() == JOINED
        results.append(projected.grad)
    assert torch.equal(*results)


def test_heads_that_are_split_can_be_differentiated_twice() -> None:
    projected = torch.randn(2, 5, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)

    def function(projected: Tensor) -> Tensor:
        query, key, value = split_heads(projected, 2, slice(0, 3))
        return (query * key.sin() * value).sum(1)

    assert torch.autograd.gradgradcheck(function, projected)
