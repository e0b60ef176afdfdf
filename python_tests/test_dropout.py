"""Philox dropout: the same bits on every backend, alone or together, and independent draws."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import output_of
from torch import Tensor

import tir_kernels
from tir_kernels.backends import reference
from tir_kernels.backends.optional import DropoutInputs
from tir_kernels.operators.choose import load_backend
from tir_kernels.operators.dropout import philox_dropout

needs_cpu_kernels = pytest.mark.skipif(
    load_backend("cpu").unavailable() != "", reason="the CPU kernels are not built"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = torch.tensor([12345678901234567, 7])


def dropped_by(name: str, rows: Tensor, dtype: torch.dtype, **changed: Any) -> Tensor:
    groups, sequences, length, width = rows.shape
    arguments = {
        "seeds": SEEDS[:groups],
        "step": torch.tensor([3]),
        "stream": 5,
        "first_branch": 1,
        "threshold": 1 << 14,
        "scale": 4 / 3,
    } | changed
    output = torch.full((groups, 2, sequences, length, width), float("nan"), dtype=dtype)
    load_backend(name).philox_dropout(DropoutInputs(rows, **arguments), output)
    return output


def test_random_numbers_are_those_of_philox() -> None:
    # The published test vectors of Philox4x32-10: counter and key of zeros, and of ones.
    def words(counter: int, key: int) -> list[int]:
        found = reference._philox([torch.tensor(counter)] * 4, torch.tensor(key))
        return [int(word) for word in found]

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(0xFFFFFFFF, -1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@needs_cpu_kernels
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
)
def test_cpu_kernel_drops_what_the_reference_drops(
    sequences: int, length: int, width: int, dtype, output_dtype, stream: int, step: int
) -> None:
    rows = torch.randn(2, sequences, length, width).to(dtype)
    changed = {"stream": stream, "step": torch.tensor([step])}
    expected = dropped_by("reference", rows, output_dtype, **changed)
    assert torch.equal(dropped_by("cpu", rows, output_dtype, **changed), expected)


@needs_cpu_kernels
def test_every_instruction_set_and_number_of_threads_drops_the_same(restored_kernels) -> None:
    kernels = restored_kernels
    rows = torch.randn(2, 9, 50, 200)
    expected = dropped_by("reference", rows, torch.float32)
    before = torch.get_num_threads()
    try:
        for name, is_supported in kernels.architectures():
            for threads in (1, 3):
                if is_supported:
                    kernels.use_architecture(name)
                    torch.set_num_threads(threads)
                    ours = dropped_by("cpu", rows, torch.float32)
                    assert torch.equal(ours, expected), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_interpreted_triton_kernel_drops_what_the_reference_drops() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    program = """
import torch
from tir_kernels.backends.optional import DropoutInputs
from tir_kernels.operators.choose import load_backend
for width in (1, 24, 100):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.randn(2, 3, 5, width).to(dtype)
        seeds, step = torch.randint(-(2**62), 2**62, (2,)), torch.tensor([77])
        expected = torch.full((2, 2, 3, 5, width), float("nan"), dtype=dtype)
        ours = expected.clone()
        inputs = DropoutInputs(rows, seeds, step, 250, 1, 16384, 4 / 3)
        for backend, output in (("reference", expected), ("triton", ours)):
            load_backend(backend).philox_dropout(inputs, output)
        assert torch.equal(ours, expected), (width, dtype)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    output_of(program, env=environment, cwd=Path(__file__).parents[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_drops_what_the_reference_drops(dtype: torch.dtype) -> None:
    rows = torch.randn(2, 5, 197, 768).to(dtype)
    arguments = {"stream": 200, "num_branches": 3, "probability": 0.25}
    step = torch.tensor([9])
    expected = philox_dropout(rows, SEEDS, step, **arguments)
    ours = philox_dropout(rows.cuda(), SEEDS.cuda(), step.cuda(), **arguments)
    assert torch.equal(ours.cpu(), expected)


def test_the_share_that_is_dropped_and_the_mean_that_is_kept() -> None:
    rows = torch.ones(2, 20, 50, 96)
    kept = philox_dropout(rows, SEEDS, torch.tensor([0]), num_branches=3, probability=0.3)
    share = (kept == 0).float().mean((2, 3, 4))
    torch.testing.assert_close(share, torch.full((2, 3), 0.3), atol=0.01, rtol=0)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)


@pytest.mark.parametrize("what", ["seed", "step", "stream", "branch", "sequence", "position"])
def test_draws_are_independent(what: str) -> None:
    rows = torch.ones(1, 2, 2, 20000)

    def kept(seed: int = 1, step: int = 1, **others: int) -> Tensor:
        return philox_dropout(
            rows, torch.tensor([seed]), torch.tensor([step]), probability=0.5, **others
        ).bool()[0, 0]

    one = kept()[0, 0]
    other = {
        "seed": lambda: kept(seed=2)[0, 0],
        "step": lambda: kept(step=2)[0, 0],
        "stream": lambda: kept(stream=1)[0, 0],
        "branch": lambda: kept(first_branch=1)[0, 0],
        "sequence": lambda: kept()[1, 0],
        "position": lambda: kept()[0, 1],
    }[what]()
    assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_group_gets_what_it_gets_alone_however_far_it_is_padded() -> None:
    rows = torch.randn(2, 3, 7, 40)
    arguments = {"num_branches": 3, "probability": 0.25, "stream": 3}
    together = philox_dropout(rows, SEEDS, torch.tensor([4]), **arguments)
    alone = philox_dropout(rows[1:, :, :5], SEEDS[1:], torch.tensor([4]), **arguments)
    assert torch.equal(together[1:, :, :, :5], alone)
    later = philox_dropout(
        rows, SEEDS, torch.tensor([4]), first_branch=2, probability=0.25, stream=3
    )
    assert torch.equal(together[:, 2:], later)


def test_empty_rows() -> None:
    kept = philox_dropout(torch.empty(2, 0, 7, 40), SEEDS, torch.tensor([0]), num_branches=3)
    assert kept.shape == (2, 3, 0, 7, 40)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"rows": torch.ones(2, 3, 4)}, ValueError, "rows must have shape"),
        ({"seeds": SEEDS[:1]}, ValueError, "seeds"),
        ({"seeds": SEEDS.int()}, TypeError, "int64"),
        ({"probability": 1.0}, ValueError, "probability"),
        ({"stream": 256}, ValueError, "stream"),
        ({"first_branch": 255, "num_branches": 2}, ValueError, "branches"),
    ],
)
def test_unsuitable_dropout_is_refused(changed: dict, kind: type, message: str) -> None:
    arguments = {"rows": torch.ones(2, 3, 4, 8), "seeds": SEEDS, "step": torch.tensor([0])}
    with pytest.raises(kind, match=message):
        philox_dropout(**(arguments | changed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_bits_do_not_depend_on_the_backend(backend: str, dtype: torch.dtype) -> None:
    if reason := tir_kernels.available_backends()[backend]:
        pytest.skip(f"backend {backend}: {reason}")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    rows, step = torch.randn(2, 3, 7, 40).to(dtype), torch.tensor([4])
    options = {"num_branches": 3, "first_branch": 2, "probability": 0.25, "stream": 3}
    expected = philox_dropout(rows, SEEDS, step, **options)
    given = (rows.to(device), SEEDS.to(device), step.to(device))
    ours = philox_dropout(*given, **options, backend=backend)
    assert ours.dtype == dtype
    assert torch.equal(ours.cpu(), expected)


def test_the_backend_that_is_named_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, step = torch.randn(1, 2, 3, 8), torch.tensor([4])
    asked = []
    for name in ("reference", "cpu", "triton"):
        monkeypatch.setattr(
            load_backend(name),
            "philox_dropout",
            lambda inputs, output, name=name: asked.append(name),
        )
    served = [name for name in ("reference", "cpu", "triton") if runs_on_cpu(name)]
    for name in served:
        philox_dropout(rows, SEEDS[:1], step, backend=name)
    assert asked == served


def runs_on_cpu(name: str) -> bool:
    backend = load_backend(name)
    return not backend.unavailable() and not backend.refusal(torch.device("cpu"))


def test_a_backend_without_dropout_is_refused_with_those_that_have_it() -> None:
    rows, step = torch.randn(1, 2, 3, 8), torch.tensor([4])
    with pytest.raises(
        ValueError,
        match=r"backend='cuda' has no philox_dropout: use backend='auto' or one of 'reference', "
        "'cpu', 'triton'",
    ):
        philox_dropout(rows, SEEDS[:1], step, backend="cuda")
    with pytest.raises(ValueError, match=r"^backend must be 'auto' or one of reference"):
        philox_dropout(rows, SEEDS[:1], step, backend="fast")


def test_float64_is_for_the_reference() -> None:
    rows, step = torch.randn(1, 2, 3, 8, dtype=torch.float64), torch.tensor([4])
    kept = philox_dropout(rows, SEEDS[:1], step, probability=0.25)
    assert kept.dtype == torch.float64
    assert torch.equal(kept[kept != 0], (rows[:, None] * (4 / 3))[kept != 0])
    single = philox_dropout(rows.float(), SEEDS[:1], step, probability=0.25)
    assert torch.equal(kept != 0, single != 0)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck(backend: str) -> None:
    rows, step = torch.randn(2, 3, 4, 8), torch.tensor([0])
    arguments = (rows, SEEDS, step, 1, 0, 3, 0.25, backend)
    torch.library.opcheck(torch.ops.tir_kernels.philox_dropout.default, arguments)
