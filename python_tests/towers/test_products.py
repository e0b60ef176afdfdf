"""Products with packed frozen matrices: PyTorch's numbers, and its products where these end."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import OWN_BLOCKS, make_clip
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tir_kernels import towers
from tir_kernels.towers import products

DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not products.is_faster(torch.bfloat16), reason="oneDNN does not multiply bfloat16 here"
        ),
    ),
]

pytestmark = pytest.mark.skipif(
    not products.can_pack(), reason="there are no products with packed matrices here"
)


def draw(dtype: torch.dtype, outputs: int = 48, width: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """(..., D) rows, a matrix (O, D) and a bias (O,)."""
    drawn = torch.randn(2, 7, width), torch.randn(outputs, width), torch.randn(outputs)
    rows, weight, bias = (each.to(dtype) for each in drawn)
    return rows, weight, bias


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice PyTorch's error, plus one rounding step of the largest number."""
    assert ours.dtype == plain.dtype
    step = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + step


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_products_and_their_gradients(dtype, has_bias, packed_shapes) -> None:
    rows, weight, bias = draw(dtype)
    rows.requires_grad_()
    bias = bias if has_bias else None
    grad = torch.randn(2, 7, 48).to(dtype)
    with products.packing([weight]):
        ours = products.linear(rows, weight, bias)
        (ours_back,) = torch.autograd.grad(ours, rows, grad)
    plain = F.linear(rows, weight, bias)
    (plain_back,) = torch.autograd.grad(plain, rows, grad)
    exact = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    assert packed_shapes == [(48, 33), (33, 48)]
    assert_as_accurate(ours.detach(), plain.detach(), exact.detach())
    assert_as_accurate(ours_back, plain_back, grad.double() @ weight.double())


def test_each_form_is_made_once_and_rows_of_a_matrix_have_their_own(packed_shapes) -> None:
    rows, weight, bias = draw(torch.float32)
    with products.packing([weight]):
        for _ in range(3):
            for first in (0, 16):
                part = products.linear(rows, weight[first : first + 16], bias[first : first + 16])
                expected = F.linear(rows, weight[first : first + 16], bias[first : first + 16])
                torch.testing.assert_close(part, expected)
    assert packed_shapes == [(16, 33)] * 2


def test_second_derivatives() -> None:
    rows, weight, _ = draw(torch.float32, outputs=5, width=4)
    with products.packing([weight]):
        assert torch.autograd.gradgradcheck(
            lambda each: products.linear(each, weight).sin(),
            rows.requires_grad_(),
            eps=1e-2,
            atol=1e-2,
            rtol=1e-2,
        )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_rounds_as_for_pytorch(dtype, packed_shapes) -> None:
    rows, weight, bias = draw(torch.float32)
    weight = weight.to(dtype)
    with torch.autocast("cpu", dtype), products.packing([weight]):
        ours, plain = products.linear(rows, weight, bias), F.linear(rows, weight, bias)
    assert len(packed_shapes) == 1
    exact = F.linear(rows.double(), weight.double(), bias.double())
    assert_as_accurate(ours, plain, exact)


def test_a_gradient_that_comes_late(packed_shapes) -> None:
    """After the context, and after the matrix has its packed form no more."""
    rows, weight, _ = draw(torch.float32)
    rows.requires_grad_()
    with products.packing([weight]):
        output = products.linear(rows, weight)
    (grad,) = torch.autograd.grad(output.sum(), rows)
    torch.testing.assert_close(grad, weight.sum(0).expand_as(rows))
    assert packed_shapes == [(48, 33)]


def written(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight.mul_(2)
    return rows, weight


PASSED_OVER = {
    "written to": written,
    "learns": lambda rows, weight: (rows, weight.detach().requires_grad_()),
    "another matrix": lambda rows, weight: (rows, weight.clone()),
    "rows of another type": lambda rows, weight: (rows.double(), weight.double()),
    "no rows": lambda rows, weight: (rows[:0], weight),
    "one row without a batch": lambda rows, weight: (rows[0, 0], weight),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_what_is_not_packed_is_pytorchs_own(case, packed_shapes) -> None:
    rows, weight, _ = draw(torch.float32)
    with products.packing([weight]):
        products.linear(rows, weight)
        before = len(packed_shapes)
        rows, weight = PASSED_OVER[case](rows, weight)
        ours = products.linear(rows, weight)
        assert len(packed_shapes) == before
    assert torch.equal(ours, F.linear(rows, weight))
    back = torch.ones_like(ours)
    assert torch.equal(products.input_gradient(back, weight), torch.matmul(back, weight))


def test_a_bias_that_learns_gets_its_gradient() -> None:
    rows, weight, bias = draw(torch.float32)
    bias.requires_grad_()
    with products.packing([weight]):
        products.linear(rows, weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((48,), 14.0))


def test_who_counts_operators_sees_pytorchs() -> None:
    rows, weight, _ = draw(torch.float32)
    with products.packing([weight]), FlopCounterMode(display=False) as counter:
        products.linear(rows, weight)
    assert counter.get_total_flops() == 2 * 14 * 48 * 33


def test_transforms_go_through_pytorch() -> None:
    rows, weight, _ = draw(torch.float32)
    with products.packing([weight]):
        batched = torch.func.vmap(lambda each: products.linear(each, weight))(rows)
        compiled = torch.compile(products.linear, backend="eager", fullgraph=True)(rows, weight)
    torch.testing.assert_close(batched, F.linear(rows, weight))
    torch.testing.assert_close(compiled, F.linear(rows, weight))


def test_contexts_nest_and_leave_nothing() -> None:
    _, weight, _ = draw(torch.float32)
    with products.packing([weight]):
        with products.packing([weight]):
            pass
        assert products._matrices
    assert not products._matrices
    with pytest.raises(ZeroDivisionError), products.packing([weight]):
        raise ZeroDivisionError
    assert not products._matrices


def test_threads_share_a_packed_matrix() -> None:
    rows, weight, _ = draw(torch.float32)
    expected, found = F.linear(rows, weight), []
    with products.packing([weight]):

        def multiply() -> None:
            found.extend(products.linear(rows, weight) for _ in range(50))

        threads = [threading.Thread(target=multiply) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 200
    for each in found:
        torch.testing.assert_close(each, expected)


@pytest.mark.parametrize(
    "layer", [nn.Linear(33, 48), nn.Linear(33, 48, bias=False)], ids=["bias", "no bias"]
)
def test_a_linear_layer(layer: nn.Linear, packed_shapes) -> None:
    layer.requires_grad_(False)
    rows, _, _ = draw(torch.float32)
    with products.packing([layer.weight]):
        torch.testing.assert_close(products.through(layer, rows), layer(rows))
        assert len(packed_shapes) == 1
        handle = layer.register_forward_hook(lambda module, inputs, output: output + 1)
        assert torch.equal(products.through(layer, rows), layer(rows))  # with what the hook adds
        handle.remove()


@pytest.mark.parametrize("options", [(), (OWN_BLOCKS, OWN_BLOCKS)], ids=["usual", "own blocks"])
def test_a_model_gives_its_blocks_matrices(options, monkeypatch) -> None:
    monkeypatch.setattr(products, "is_faster", lambda dtype: dtype == torch.float32)
    model = make_clip(*options)
    assert towers.packable(model) == []  # they learn
    model.requires_grad_(False)
    found = towers.packable(model)
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    matrices = [each for block in blocks for each in block.parameters() if each.dim() == 2]
    assert {id(each) for each in found} == {id(each) for each in matrices}
    assert towers.packable(model.bfloat16()) == []


def test_no_type_is_taken_that_onednn_lacks(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    types = (torch.float32, torch.bfloat16, torch.float16)
    assert not any(products.is_faster.__wrapped__(dtype) for dtype in types)
