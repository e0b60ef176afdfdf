"""The Triton backend against the reference in float64, interpreted or on a GPU.

The bound on an error is relative to plain PyTorch: twice what the same formula gives with plain
operations in the same type, plus one rounding step.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_cases import (
    BACKEND,
    NAN,
    attention_inputs,
    random_tensor,
    relevance_inputs,
    run_attention,
    run_statistics,
)


def run_everything(device: str) -> list[Tensor]:
    results = run_attention(*attention_inputs(2, 2, 50, 24, torch.bfloat16, device), 0.2)
    inputs = relevance_inputs(device)
    results += run_statistics(2, 2, 50, 24, torch.bfloat16, device)
    results.append(BACKEND.relevance(inputs))
    results += BACKEND.token_weights(inputs, random_tensor(6).to(device), 14)
    return results


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new tensor is full of NaN, so that a place nobody writes to shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(NAN if tensor.is_floating_point() else -(2**31))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def test_every_output_is_written(device: str, poisoned_memory: None) -> None:
    for result in run_everything(device):
        assert result.isfinite().all()
        assert (result > -(2**30)).all()


def test_same_inputs_same_bits(device: str) -> None:
    for first, second in zip(run_everything(device), run_everything(device), strict=True):
        assert torch.equal(first, second)


# Availability


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKEND.unavailable() == ""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert BACKEND.refusal(cpu) == BACKEND.refusal(gpu) == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA" in BACKEND.refusal(cpu)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device" in BACKEND.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert BACKEND.unavailable() == BACKEND.refusal(gpu) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    for reason in (BACKEND.unavailable(), BACKEND.refusal(gpu)):
        assert "Old GPU has compute capability 7.5" in reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in BACKEND.unavailable()


@pytest.mark.slow
def test_importing_the_backend_does_not_import_triton() -> None:
    program = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from tir_kernels.operators.choose import load_backend\n"
        "backend = load_backend('triton')\n"
        "backend.unavailable(), backend.refusal(torch.device('cpu'))\n"
        "assert ('triton' in sys.modules) == before\n"
        "assert not before, 'PyTorch imports Triton itself: nothing shown'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
