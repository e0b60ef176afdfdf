"""The GPUs that the CUDA and Triton backends say they serve, with stand-ins for the machine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import tir_kernels
from tir_kernels import __main__ as report
from tir_kernels.backends import cuda
from tir_kernels.operators import choose as dispatch

OLD, HOPPER, NEWER = (7, 5), (9, 0), (12, 0)
CUDA_13_0 = (13000, 13000, "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Makes a machine of GPUs of these capabilities, the first current, and of kernels for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def make(*capabilities: tuple[int, int], runtime=CUDA_13_0, built: str = "80+PTX;90") -> None:
        def index_of(device: int | torch.device | None = None) -> int:
            return 0 if device is None else torch.device("cuda", device).index

        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "device_count": lambda: len(capabilities),
            "get_device_capability": lambda device=None: capabilities[index_of(device)],
            "get_device_name": lambda device=None: f"GPU number {index_of(device)}",
            "get_device_properties": lambda index: SimpleNamespace(
                name=f"GPU number {index}",
                major=capabilities[index][0],
                minor=capabilities[index][1],
                total_memory=80 * 2**30,
            ),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        kernels = SimpleNamespace(architectures=lambda: built, runtime=lambda: runtime)
        monkeypatch.setattr(cuda, "_compiled", lambda: kernels)
        dispatch.choose_backend.cache_clear()

    yield make
    dispatch.choose_backend.cache_clear()


def chosen(device: str, name: str = "auto") -> str:
    return dispatch.choose_backend(
        name, "attention_forward", torch.device(device), torch.float32
    ).name


@pytest.mark.parametrize("order", [(OLD, HOPPER), (HOPPER, OLD)])
def test_each_gpu_is_served_by_what_it_can_do(machine, order) -> None:
    machine(*order)
    old, new = (f"cuda:{order.index(capability)}" for capability in (OLD, HOPPER))
    for _ in range(2):  # the second time the choice is remembered
        assert chosen(new) == "cuda"
        assert chosen(old) == "reference"
        assert chosen(new, "triton") == "triton"
    for name in ("cuda", "triton"):
        with pytest.raises(ValueError, match=rf"on '{old}': GPU number .*7\.5"):
            chosen(old, name)
    reasons = tir_kernels.available_backends()
    assert reasons["cuda"] == reasons["triton"] == ""


def test_devices_without_kernels_are_served_by_the_reference(machine) -> None:
    machine(HOPPER)
    for device in ("meta", "mps"):
        assert chosen(device) == "reference"
        with pytest.raises(ValueError, match=f"tensors on '{device}'"):
            chosen(device, "cuda")


def test_only_old_gpus_are_a_reason(machine) -> None:
    machine(OLD, OLD)
    reasons = tir_kernels.available_backends()
    assert "GPU number 0 (compute capability 7.5) is older than 8.0" in reasons["cuda"]
    assert "GPU number 0 has compute capability 7.5" in reasons["triton"]
    assert chosen("cuda:1") == "reference"


@pytest.mark.parametrize(
    ("gpu", "runtime", "parts"),
    [
        (
            HOPPER,
            (13000, 12080, "CUDA driver version is insufficient"),
            [
                "built with CUDA 13.0",
                "'CUDA driver version is insufficient'",
                "the driver serves CUDA 12.8: update the driver",
            ],
        ),
        (
            NEWER,
            (13020, 13000, ""),
            [
                "no machine code for GPU number 0",
                "CUDA 13.0, cannot compile what CUDA 13.2 left",
                "TIR_CUDA_ARCHS=120",
            ],
        ),
    ],
)
def test_what_a_driver_cannot_do_is_a_reason(machine, gpu, runtime, parts) -> None:
    machine(gpu, runtime=runtime)
    reason = tir_kernels.available_backends()["cuda"]
    for part in parts:
        assert part in reason


def test_a_driver_older_than_the_linked_runtime_leaves_triton(machine) -> None:
    machine(HOPPER, runtime=(13000, 12080, "CUDA driver version is insufficient"))
    assert chosen("cuda:0") == "triton"
    with pytest.raises(RuntimeError, match=r"cannot run here.*driver serves CUDA 12\.8"):
        chosen("cuda:0", "cuda")


def test_a_driver_need_not_compile_for_a_gpu_with_machine_code(machine) -> None:
    machine(NEWER, runtime=(13020, 13020, ""))
    assert chosen("cuda:0") == "cuda"
    machine(HOPPER, runtime=(13020, 13000, ""))  # has machine code
    assert chosen("cuda:0") == "cuda"


def test_gpus_that_the_build_left_out_are_a_reason(machine) -> None:
    machine((8, 0), NEWER, built="90")
    assert "TIR_CUDA_ARCHS=80" in tir_kernels.available_backends()["cuda"]
    assert [chosen(f"cuda:{index}") for index in range(2)] == ["triton", "triton"]


def test_the_report_names_the_linked_cuda_and_what_each_gpu_takes(machine) -> None:
    machine(HOPPER, OLD)
    assert report.backends()["cuda"] == "runs (built for 80+PTX;90 with CUDA 13.0)"
    facts = report.machine()
    assert facts["GPU 0"] == "GPU number 0, sm_90, 80 GiB; 'auto' takes cuda"
    assert facts["GPU 1"] == "GPU number 1, sm_75, 80 GiB; 'auto' takes reference"


def test_the_compiled_module_says_what_it_was_linked_with() -> None:
    kernels = cuda._compiled()
    if kernels is None:
        pytest.skip("the package was built without CUDA kernels")
    version, driver_version, error = kernels.runtime()
    assert version >= 12080
    if torch.cuda.is_available():
        assert error == ""
        assert driver_version >= 12000
    else:
        assert error != ""


def test_triton_needs_no_gpu_to_name_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton = dispatch.load_backend("triton")
    assert triton.refusal(torch.device("cpu")) == ""
    assert "CUDA" in triton.refusal(torch.device("meta"))


CAPABILITIES = [(7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)]


@pytest.mark.parametrize(
    ("built", "served"),
    [
        ("80+PTX;90", CAPABILITIES[1:]),
        ("80+PTX;90a", CAPABILITIES[1:]),
        ("80;90a", [(8, 0), (8, 6), (9, 0)]),
        ("90a", [(9, 0)]),
        ("100", [(10, 0), (10, 3)]),
    ],
)
def test_which_gpus_code_runs_on(built: str, served: list[tuple[int, int]]) -> None:
    assert [each for each in CAPABILITIES if cuda.runs_on(built, each)] == served
