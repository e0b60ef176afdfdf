"""Fixtures for the tests of one backend at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import amx_emulation
import cuda_emulation
import pytest
import torch

from tir_kernels.backends import cpu
from tir_kernels.operators.choose import load_backend

ARCHITECTURES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
EMULATED = "amx emulated"  # its vectors are those of avx512_bf16


@pytest.fixture
def keep_thread_count() -> Iterator[None]:
    """Lets a test set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[*ARCHITECTURES, pytest.param(EMULATED, marks=pytest.mark.slow)])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on each instruction set of the CPU backend."""
    if reason := load_backend("cpu").unavailable():
        pytest.skip(reason)
    kernels = cpu._kernels()
    needed = "avx512_bf16" if request.param == EMULATED else request.param
    if not dict(kernels.architectures()).get(needed, False):
        pytest.skip(f"this machine does not run {needed}")
    if request.param == EMULATED:
        if reason := amx_emulation.missing():
            pytest.skip(reason)
        emulated = amx_emulation.EmulatedKernels(kernels)
        monkeypatch.setattr(cpu, "_kernels", lambda: emulated)
        yield request.param
        return
    before = kernels.architecture()
    kernels.use_architecture(request.param)
    yield request.param
    kernels.use_architecture(before)


@pytest.fixture
def kernels() -> Iterator[object]:
    """The emulated CUDA kernels; their settings are put back at the end."""
    module = cuda_emulation.register().kernels
    yield module
    module.set_thread_order(int(os.environ.get("TIR_EMULATION_ORDER", "0")))
    module.set_device(*cuda_emulation.DEVICES["a whole GPU"])
