"""Products with rows that are dropped as they are read: those of dropout and a product."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import output_of
from torch import Tensor

from tir_kernels.operators.dropout import philox_dropout
from tir_kernels.operators.dropped_product import dropped_product, factor_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS, STEP = torch.tensor([12345678901234567, -7]), torch.tensor([3])
DRAWN: dict[str, Any] = {"stream": 200, "first_branch": 1, "probability": 0.25}


def made(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(shape).to(device, dtype)


def check(
    backend: str,
    dtype: torch.dtype,
    rank: int,
    shape: tuple[int, int, int],
    device: str = "cpu",
    groups: tuple[int, int] = (2, 3),
) -> None:
    """Both products against float64 ones of the same dropped rows, beside PyTorch's.

    Args:
        backend: Ours.
        dtype: Of everything.
        rank: R.
        shape: (S, T, D) of a group of rows.
        device: Where they are.
        groups: At most two, and branches.
    """
    torch.manual_seed(0)
    rows = made(groups[0], *shape, dtype=dtype, device=device)
    factor = made(*groups, rank, shape[2], dtype=dtype, device=device)
    grad = made(*groups, shape[0] * shape[1], rank, dtype=dtype, device=device)
    counted = SEEDS[: groups[0]].to(device), STEP.to(device)
    dropped = philox_dropout(rows, *counted, num_branches=groups[1], **DRAWN).flatten(2, 3)
    for ours, left, right in (
        (dropped_product(rows, *counted, factor, backend=backend, **DRAWN), dropped, factor.mT),
        (factor_gradient(rows, *counted, grad, backend=backend, **DRAWN), grad.mT, dropped),
    ):
        exact, theirs = left.double() @ right.double(), left @ right
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_products_are_those_of_dropped_rows(backend: str, dtype: torch.dtype) -> None:
    check(backend, dtype, 5, (3, 7, 100))


@pytest.mark.slow
def test_interpreted_triton_kernels_multiply_dropped_rows() -> None:
    """Also more rows than a program adds up, and ranks that fill no tile or are too wide.

    As many rows as large tiles take are of one group and branch; of several, programs are made to
    add up few.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    program = """
from test_dropped_product import DTYPES, check
from tir_kernels.backends.triton.kernels import dropped_product as kernels
for dtype in DTYPES:
    check("triton", dtype, 4, (2, 5, 24))
    check("triton", dtype, 16, (1, 7, 300))
check("triton", DTYPES[0], 70, (1, 3, 24))
check("triton", DTYPES[1], 16, (11, 97, 40), groups=(1, 1))
kernels._LARGEST_SPLIT = 32
check("triton", DTYPES[0], 20, (2, 40, 3))
"""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    output_of(program, env=environment, cwd=tests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(25, 197, 768), (5, 9, 512)])
def test_a_gpu_multiplies_dropped_rows(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check("triton", dtype, 16, shape, "cuda")


def test_no_rows_give_no_products() -> None:
    rows, factor = torch.ones(2, 0, 5, 8), torch.ones(2, 3, 4, 8)
    assert dropped_product(rows, SEEDS, STEP, factor, **DRAWN).shape == (2, 3, 0, 4)
    grad = factor_gradient(rows, SEEDS, STEP, torch.ones(2, 3, 0, 4), **DRAWN)
    assert torch.equal(grad, torch.zeros(2, 3, 4, 8))


ROWS, FACTOR = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 4, 8)


@pytest.mark.parametrize(
    ("factor", "options", "error", "message"),
    [
        (FACTOR[0], {}, ValueError, r"^factor must have shape \(G, K, R, D\)"),
        (FACTOR[:1], {}, ValueError, "^factor must have 2 entries in dimension 0"),
        (FACTOR[..., :4], {}, ValueError, "^factor must have 8 entries in dimension 3"),
        (FACTOR.half(), {}, TypeError, "^factor must be of the type of rows"),
        (FACTOR, {"probability": 1.0}, ValueError, "^probability must lie in"),
        (FACTOR, {"first_branch": 254}, ValueError, "^stream and branches must lie in"),
        (FACTOR, {"backend": "x"}, ValueError, "^backend must be"),
    ],
)
def test_unsuitable_arguments_are_refused(
    factor: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dropped_product(ROWS, SEEDS, STEP, factor, **options)


def test_a_gradient_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="15 entries in dimension 2"):
        factor_gradient(ROWS, SEEDS, STEP, torch.ones(2, 3, 14, 4))


def test_the_operators_are_sound() -> None:
    numbers = (7, 1, 0.25, "auto")
    check = torch.library.opcheck
    check(torch.ops.tir_kernels.dropped_product.default, (ROWS, SEEDS, STEP, FACTOR, *numbers))
    grad = torch.ones(2, 3, 15, 4)
    check(torch.ops.tir_kernels.factor_gradient.default, (ROWS, SEEDS, STEP, grad, *numbers))
