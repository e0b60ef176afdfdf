"""Fixtures for the tests of one backend at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import cpu_emulation
import cuda_emulation
import pytest
import torch

from tir_kernels.backends import cpu
from tir_kernels.operators.choose import load_backend

ARCHITECTURES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
EMULATED = tuple(f"{name} emulated" for name in cpu_emulation.ARCHITECTURES)


@pytest.fixture
def keep_thread_count() -> Iterator[None]:
    """Lets a test set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(
    params=[*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in EMULATED)]
)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on each instruction set of the CPU backend."""
    if reason := load_backend("cpu").unavailable():
        pytest.skip(reason)
    kernels = cpu._kernels()
    runs = dict(kernels.architectures())
    if request.param in EMULATED:
        emulated = request.param.removesuffix(" emulated")
        if reason := cpu_emulation.unavailable(emulated, runs):
            pytest.skip(reason)
        replacement = cpu_emulation.EmulatedKernels(kernels, emulated)
        monkeypatch.setattr(cpu, "_kernels", lambda: replacement)
        yield request.param
        return
    if not runs.get(request.param, False):
        pytest.skip(f"this machine does not run {request.param}")
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
