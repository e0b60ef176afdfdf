"""Residual and layer normalisation: as exact as PyTorch's, on every backend that has it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import output_of
from torch import Tensor

from tir_kernels.operators.add_norm import add_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Results = list[Tensor]


def results(function: Any, tensors: list[Tensor | None], grads: list[Tensor]) -> Results:
    """The total, it normalised, and the gradients of both summands."""
    inputs = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    total, normed = function(*inputs)
    wanted = [each for each in inputs if each is not None]
    upstream = [grads[0].to(total), grads[1].to(normed)]
    found = torch.autograd.grad([total, normed], wanted, upstream)
    return [each.detach().double() for each in (total, normed, *found)]


def check(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype | None, torch.dtype],
    backend: str,
    device: str = "cpu",
) -> None:
    """Results against float64, beside those of plain PyTorch.

    Args:
        shape: Of the rows.
        dtypes: Of the stream, of the change (``None``: there is none) and of what is normalised.
        backend: Ours.
        device: Where it runs.
    """
    stream, of_change, of_normed = dtypes
    torch.manual_seed(0)
    hidden = (3 * torch.randn(shape) + 1).to(stream)
    change = None if of_change is None else torch.randn(shape).to(of_change)
    weight, bias = torch.rand(shape[-1]) + 0.5, torch.randn(shape[-1])
    grads = [torch.randn(shape).to(stream), torch.randn(shape).to(of_normed)]

    def plain(hidden: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = hidden if change is None else hidden + change
        total = total * 1  # as an output of its own
        is_exact = hidden.dtype == torch.float64
        wide = total if is_exact else total.float()
        gains = weight.to(wide), bias.to(wide)
        normed = F.layer_norm(wide, shape[-1:], *gains, 1e-5)
        return total, normed if is_exact else normed.to(of_normed)

    def ours(hidden: Tensor, change: Tensor | None = None) -> tuple[Tensor, Tensor]:
        gains = weight.to(hidden.device), bias.to(hidden.device)
        return add_norm(hidden, change, *gains, eps=1e-5, dtype=of_normed, backend=backend)

    given = [each for each in (hidden, change) if each is not None]
    exact = results(plain, [each.double() for each in given], grads)
    theirs = results(plain, given, grads)
    on_device = [each.to(device) for each in given]
    mine = [each.cpu() for each in results(ours, on_device, [g.to(device) for g in grads])]
    types = [stream, of_normed, stream, *([] if of_change is None else [of_change])]
    for expected, their, our, dtype in zip(exact, theirs, mine, types, strict=True):
        # One rounding of the largest result is allowed where PyTorch happens to be exact.
        rounding = torch.finfo(dtype).eps * expected.abs().max()
        assert (our - expected).abs().max() <= 2 * (their - expected).abs().max() + rounding
        assert (our - expected).abs().mean() <= 2 * (their - expected).abs().mean() + rounding / 8


STREAMS = [
    (torch.float32, None, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, None, torch.float16),
    (torch.float16, torch.float16, torch.float16),
]


@pytest.mark.parametrize("shape", [(3, 5, 200), (7, 1), (40, 1029)])
@pytest.mark.parametrize("dtypes", STREAMS, ids=str)
def test_reference_is_as_exact_as_pytorch(shape: tuple[int, ...], dtypes: tuple) -> None:
    check(shape, dtypes, "reference")


@pytest.mark.slow
def test_interpreted_triton_kernels_are_as_exact_as_pytorch() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = """
from test_add_norm import STREAMS, check
for dtypes in STREAMS:
    for shape in ((2, 3, 200), (4, 1), (3, 1029)):
        check(shape, dtypes, "triton")
"""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    output_of(program, env=environment, cwd=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", STREAMS, ids=str)
def test_a_gpu_is_as_exact_as_pytorch(dtypes: tuple) -> None:
    check((25, 197, 768), dtypes, "triton", "cuda")


def test_without_a_change_the_total_is_what_came() -> None:
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    total, _ = add_norm(hidden, None, torch.ones(8), None)
    assert torch.equal(total, hidden)
    assert total.data_ptr() == hidden.data_ptr()


def test_a_result_that_is_not_used_has_no_part_in_the_gradient() -> None:
    hidden, change = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    total, _ = add_norm(hidden, change, torch.ones(8), None)
    found = torch.autograd.grad(total.sum(), [hidden, change])
    assert all((grad == 1).all() for grad in found)


def test_strided_rows_give_what_contiguous_ones_give() -> None:
    hidden, change = (torch.randn(3, 8, 5).mT for _ in range(2))
    gains = torch.rand(8), torch.randn(8)
    ours = add_norm(hidden, change, *gains)
    theirs = add_norm(hidden.contiguous(), change.contiguous(), *gains)
    assert all(map(torch.equal, ours, theirs))


def test_no_rows_give_no_rows() -> None:
    total, normed = add_norm(torch.ones(0, 8), torch.ones(0, 8), torch.ones(8), None)
    assert total.shape == normed.shape == (0, 8)


def test_a_second_derivative_is_refused() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    _, normed = add_norm(hidden, None, torch.rand(8), None)
    (grad,) = torch.autograd.grad(normed.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative here: .*layer_norm"):
        grad.square().sum().backward()


ROWS, GAINS = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: add_norm([1.0], None, GAINS, None), TypeError, "^hidden must be a tensor"),
        (lambda: add_norm(GAINS[0], None, GAINS, None), ValueError, r"got \(\)"),
        (lambda: add_norm(ROWS, ROWS[:1], GAINS, None), ValueError, r"^change .*\(2, 8\); got"),
        (lambda: add_norm(ROWS, None, GAINS[:4], None), ValueError, r"^weight .*\(8,\); got"),
        (lambda: add_norm(ROWS, None, GAINS, GAINS[:4]), ValueError, r"^bias .*\(8,\); got"),
        (
            lambda: add_norm(ROWS, None, GAINS.clone().requires_grad_(), None),
            ValueError,
            "^weight must be frozen",
        ),
        (lambda: add_norm(ROWS.half(), ROWS, GAINS, None), TypeError, "^change must be of the"),
        (lambda: add_norm(ROWS, None, GAINS, None, backend="x"), ValueError, "^backend must be"),
    ],
)  # fmt: skip
def test_unsuitable_arguments_are_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_operators_are_sound() -> None:
    """Schema, shapes and types without data, and no input changed."""
    check = torch.library.opcheck
    rows = torch.randn(3, 8)
    arguments = (rows, rows.bfloat16(), GAINS, GAINS, 1e-5, torch.bfloat16, "auto")
    check(torch.ops.tir_kernels.add_norm.default, arguments)
    backward = (rows, GAINS, rows, rows.bfloat16(), 1e-5, torch.bfloat16, "auto")
    check(torch.ops.tir_kernels.add_norm_backward.default, backward)
