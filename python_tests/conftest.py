"""Shared set-up: backends as fixtures; Triton kernels are interpreted where there is no GPU."""

import gc
import os
from collections.abc import Generator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes share the cores; tests of several threads ask for them. Before anything imports
    # PyTorch, so that processes that tests start do the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Must be set before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for garbage neither while modules are imported nor, later on, in what they made.

    Modules and tests live until the end, and looking through them takes a third of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


# Where a CPU plays the GPU, kernels take long, and emulated ones are compiled first.
_PLAYED = [] if torch.cuda.is_available() else [pytest.mark.slow]
_BACKENDS = (
    "reference",
    "cpu",
    pytest.param("triton", marks=_PLAYED),
    "cuda",
    pytest.param("cuda-emulated", marks=pytest.mark.slow),
)


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here; the others are skipped with the reason they give."""
    import cuda_emulation

    import tir_kernels

    if request.param == cuda_emulation.NAME:
        if reason := cuda_emulation.missing():
            pytest.skip(f"emulation of the CUDA kernels {reason}")
        cuda_emulation.register()
    elif reason := tir_kernels.available_backends()[request.param]:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """The device a backend is tested on."""
    on_gpu = torch.cuda.is_available() and backend in ("triton", "cuda")
    return "cuda" if on_gpu else "cpu"


@pytest.fixture
def is_slow(backend: str, device: str) -> bool:
    """Whether a CPU plays the GPU, so that only small sizes are tried."""
    return device == "cpu" and backend in ("triton", "cuda-emulated")


@pytest.fixture
def poisoned_outputs():
    """Fill what torch.empty gives with NaN, so that an element a kernel forgets shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restored_kernels():
    """The compiled kernels of the CPU, whose instruction set is put back at the end."""
    from tir_kernels.operators.choose import load_backend

    if reason := load_backend("cpu").unavailable():
        pytest.skip(f"backend cpu: {reason}")
    from tir_kernels import _C

    before = _C.architecture()
    yield _C
    _C.use_architecture(before)


@pytest.fixture
def packed_shapes(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the matrices that are packed for products from now on."""
    from tir_kernels.towers import products

    if not products.can_pack():
        pytest.skip("there are no products with packed matrices here")
    shapes: list[torch.Size] = []
    pack = torch.ops.mkldnn._reorder_linear_weight

    def noted(matrix: torch.Tensor, rows: int) -> torch.Tensor:
        shapes.append(matrix.shape)
        return pack(matrix, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", noted)
    return shapes
