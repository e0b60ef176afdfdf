"""The CPU backend and its process: threads, forks, choice of instructions, bad calls."""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attention_cases import packed_heads
from programs import output_of
from torch import Tensor

from tir_kernels.backends import cpu
from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators.choose import load_backend

CPU = load_backend("cpu")

pytestmark = [
    pytest.mark.skipif(CPU.unavailable() != "", reason=CPU.unavailable() or "runs here"),
    pytest.mark.usefixtures("keep_thread_count"),
]

TIMEOUT = 60.0  # seconds after which a process counts as hanging


def work_for_threads() -> tuple[Tensor, Tensor]:
    """A problem that is large enough for several threads."""
    torch.manual_seed(3)
    query, key, value = packed_heads(2, 4, 197, 64, torch.float32)
    return CPU.attention_forward(AttentionInputs(query, key, value, torch.ones(2, 197), 0.125))


def test_plain_threads_give_the_same_bits() -> None:
    kernels = cpu._kernels()
    torch.set_num_threads(3)
    on_openmp = work_for_threads()
    kernels.use_openmp(0, 0)
    try:
        assert kernels.thread_source() == "plain threads"
        on_plain_threads = work_for_threads()
    finally:
        kernels.use_openmp(*cpu._openmp_addresses())
    assert all(torch.equal(a, b) for a, b in zip(on_openmp, on_plain_threads, strict=True))


def test_several_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    expected = work_for_threads()[0]
    query, key, value = packed_heads(2, 4, 197, 64, torch.float32)
    del query, key, value
    torch.manual_seed(3)
    rows = packed_heads(2, 4, 197, 64, torch.float32)
    inputs = AttentionInputs(*rows, torch.ones(2, 197), 0.125)
    outputs: list[Tensor] = []

    def call() -> None:
        outputs.append(CPU.attention_forward(inputs)[0])

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert len(outputs) == 4
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
def test_no_threads_beside_those_of_torch() -> None:
    program = """
import os, torch
from tir_kernels.backends import cpu
from tir_kernels.backends.inputs import AttentionInputs
torch.set_num_threads(2)
a = torch.randn(512, 512); a @ a; a.exp()
before = len(os.listdir("/proc/self/task"))
q = torch.randn(2, 8, 197, 64)
for _ in range(3):
    inputs = AttentionInputs(q, q, q, torch.ones(2, 197), 0.125)
    cpu.CpuBackend().attention_forward(inputs)
print(before, len(os.listdir("/proc/self/task")), cpu._kernels().thread_source())
"""
    before, after, source = output_of(program).split(" ", 2)
    assert source == "OpenMP of torch"
    assert before == after


class AttentionDataset(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return torch.get_num_threads(), work_for_threads()[0]


def test_a_data_loader_worker_computes_on_its_one_thread() -> None:
    torch.set_num_threads(2)
    expected = work_for_threads()[0]  # the parent has used its threads before it forks
    loader = torch.utils.data.DataLoader(
        AttentionDataset(), batch_size=None, num_workers=2, timeout=TIMEOUT,
        multiprocessing_context="fork",
    )  # fmt: skip
    for threads, output in loader:
        assert threads == 1
        assert torch.equal(output, expected)


def _send_work(sender) -> None:
    sender.send_bytes(work_for_threads()[0].numpy().tobytes())


def test_a_fork_after_use_does_not_hang() -> None:
    torch.set_num_threads(2)
    # The child keeps two threads, which OpenMP could not serve there; torch's own random numbers
    # and copies of these sizes run on the calling thread.
    expected = work_for_threads()[0].numpy().tobytes()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_work, args=(sender,))
    process.start()
    try:
        assert receiver.poll(TIMEOUT), "the child hangs"
        assert receiver.recv_bytes() == expected
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["portable", "nonsense"])
def test_the_environment_names_an_instruction_set(name: str) -> None:
    program = (
        "from tir_kernels.operators.choose import load_backend; cpu = load_backend('cpu')\n"
        "print(cpu.unavailable() or cpu.description())"
    )
    output = output_of(program, env={**os.environ, "TIR_CPU_ARCH": name})
    if name == "portable":
        assert output.startswith("portable (this machine runs portable")
    else:
        assert "TIR_CPU_ARCH" in output
        assert "got nonsense" in output


def test_unavailable_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'tir_kernels._C'")

    monkeypatch.setattr(cpu, "_kernels", missing)
    assert "install a C++17 compiler" in CPU.unavailable()
    assert CPU.description() == ""
    assert CPU.refusal(torch.device("cpu")) == ""
    assert "cuda" in CPU.refusal(torch.device("cuda"))


def bad_calls() -> list[tuple[str, Callable[[], object]]]:
    kernels = cpu._kernels() if not CPU.unavailable() else None
    grid = (64, 0, 0, 0)
    return [
        ("B, H, Lq, L, d >= 1", lambda: kernels.attention_forward(
            (1, 0, 1, 1, 1), "float32", 1.0, False, grid, grid, grid, 64, grid, 64, 1)),
        ("unknown type", lambda: kernels.attention_forward(
            (1, 1, 1, 1, 1), "float64", 1.0, False, grid, grid, grid, 64, grid, 64, 1)),
        ("query is null", lambda: kernels.attention_forward(
            (1, 1, 1, 1, 1), "float32", 1.0, False, (0, 0, 0, 0), grid, grid, 64, grid, 64, 1)),
        ("0 <= P <= Lq", lambda: kernels.attention_statistics(
            (1, 1, 1, 1, 1), "float32", 1.0, False, grid, grid, 0, 2, 64, 64, 64, 64, 1)),
        ("entropy is null", lambda: kernels.attention_statistics(
            (1, 1, 1, 1, 1), "float32", 1.0, False, grid, grid, 0, 1, 64, 64, 0, 64, 1)),
        ("weights is null, and their gradient is wanted", lambda: kernels.attention_backward(
            (1, 1, 1, 1, 1), "float32", 1.0, False, *[grid] * 4, 0, grid, 64, *[grid] * 3, 64,
            1)),
        ("0 <= K <= N", lambda: kernels.select_tokens((1, 1, 4, 0), 5, 64, 64, 64, 64, 1)),
        ("class_embeddings is null", lambda: kernels.relevance(
            ((1, 4, 1, 8, 8, 1, 2), "float32", grid, "float32", 0, False, "float32", 0, 0, 0.0,
             "float32", 0, 0, 0), 64, 1)),
        ("0 <= K <= N", lambda: kernels.token_weights(
            ((1, 4, 1, 8, 8, 1, 2), "float32", grid, "float32", 64, False, "float32", 0, 0, 0.0,
             "float32", 0, 0, 0), 4, 64, 64, 64, 1)),
        ("counts is null", lambda: kernels.look_up_weights((1, 4, 1), 64, 0, 64)),
    ]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), bad_calls(), ids=lambda value: str(value)[:20])
def test_the_bindings_check_sizes(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names an instruction of x86")
def test_prefetches_are_in_every_build() -> None:
    """A compiler that drops them changes no result."""
    module = cpu._kernels()
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", module.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Queries, keys and values of the forward pass, and at least one loop of the backward pass.
    assert listing.count("\tprefetch") >= 4 * len(module.architectures())
