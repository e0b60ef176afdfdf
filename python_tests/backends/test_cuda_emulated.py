"""The CUDA attention kernels, emulated: every path of theirs, any order of threads, and what the
emulation itself notices. The tests of the operators run through the same backend.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import oracle
import proofs
import pytest
import torch
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, WeightRule
from tir_kernels.backends.inputs import AttentionInputs

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(bool(cuda_emulation.missing()), reason=cuda_emulation.missing() or "runs"),
    pytest.mark.slow,
]


def draw(
    batch: int, heads: int, length: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    """q, k, v as views of a packed projection, weights of which some are 0 or less, grad_output."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, length, 3, heads, width, generator=generator).to(dtype)
    weights = torch.rand(batch, length, generator=generator) * 2
    weights[:, ::5] = 0.0
    weights[:, 3::7] = -1.0
    grad_output = torch.randn(batch, heads, length, width, generator=generator).to(dtype)
    return (*packed.permute(2, 0, 3, 1, 4), weights, grad_output)


def run(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, grad_output: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v, weights)]
    output = tir_kernels.weighted_attention(*leaves, backend=cuda_emulation.NAME)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def check(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, grad_output: Tensor) -> None:
    scale = q.shape[3] ** -0.5
    ours = run(q, k, v, weights, grad_output)
    oracle.assert_attention_as_accurate(ours, q, k, v, weights, scale, grad_output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", cuda_emulation.DEVICES)
def test_resident_and_passing_keys(kernels, device: str, dtype: torch.dtype) -> None:
    """197 keys stay in shared memory where there is enough of it, and pass through where not."""
    kernels.set_device(*cuda_emulation.DEVICES[device])
    check(*draw(1, 1, 197, 64, dtype, 0))
    check(*draw(1, 1, 145, 128, dtype, 1))


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_one_block_a_head_and_several(kernels, multiprocessors: int) -> None:
    kernels.set_device(multiprocessors, 227 * 1024)
    check(*draw(1, 2, 150, 64, torch.bfloat16, 2))
    check(*draw(1, 2, 150, 80, torch.float32, 3))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_order_of_threads_does_not_matter(kernels, order: int) -> None:
    inputs = [draw(2, 1, 75, 64, dtype, 4) for dtype in (torch.bfloat16, torch.float32)]
    kernels.set_thread_order(0)
    expected = [run(*each) for each in inputs]
    kernels.set_thread_order(order)
    for each, before in zip(inputs, expected, strict=True):
        for ours, theirs in zip(run(*each), before, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [64, 72, 20])
def test_rows_off_16_byte_boundaries(kernels, width: int, offset: int) -> None:
    generator = torch.Generator().manual_seed(5)
    storage = torch.randn(3, 1, 2, 40, width + 5, generator=generator)
    for dtype in DTYPES:
        q, k, v = storage.to(dtype)[..., offset : offset + width]
        weights = torch.rand(1, 40, generator=generator)
        check(q, k, v, weights, torch.randn(1, 2, 40, width, generator=generator).to(dtype))


def token_inputs(batch: int, length: int, num_classes: int, groups: int) -> dict:
    generator = torch.Generator().manual_seed(6)
    classes = torch.randn(groups, num_classes, 24, generator=generator)
    return {
        "tokens": torch.randn(batch, length, 32, generator=generator),
        "class_embeddings": classes,
        "joint_space": JointSpace(
            torch.rand(32, generator=generator),
            torch.randn(32, generator=generator),
            proj=torch.randn(32, 24, generator=generator),
        ),
        "backend": cuda_emulation.NAME,
    }


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("length", "num_classes", "groups", "prefix"),
    [(40, 5, 1, 1), (53, 16, 2, 5), (40, 17, 1, 0), (70, 3, 2, 1)],
)
def test_weights_looked_up_in_the_attention_kernel(
    kernels, length: int, num_classes: int, groups: int, prefix: int, order: int
) -> None:
    """It is as if the weights had been given."""
    kernels.set_thread_order(order)
    q, k, v, _, grad_output = draw(2, 2, length, 64, torch.float32, 7)
    given = token_inputs(2, length, num_classes, groups) | {"num_prefix_tokens": prefix}
    table = torch.linspace(2.0, -0.5, num_classes + 1).requires_grad_()
    weights, _ = tir_kernels.token_weights(**given, table=table)
    expected_output = tir_kernels.weighted_attention(q, k, v, weights, backend=given["backend"])
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    output = tir_kernels.reweighted_attention(*leaves, **given, table=table)
    assert torch.equal(output, expected_output)
    grads = torch.autograd.grad(output, [*leaves, table], grad_output)
    expected = run(q, k, v, weights.detach(), grad_output)[1:4]
    for ours, theirs in zip(grads[:3], expected, strict=True):
        assert torch.equal(ours, theirs)
    through_weights = torch.autograd.grad(
        tir_kernels.weighted_attention(q, k, v, weights, backend=given["backend"]),
        table,
        grad_output,
    )[0]
    torch.testing.assert_close(grads[3], through_weights)


@pytest.mark.parametrize("ratio", [0.0, 0.02, 1.0])
def test_selecting_nothing_one_and_all(kernels, ratio: float) -> None:
    q, k, v, _, _ = draw(2, 2, 57, 64, torch.bfloat16, 8)
    given = token_inputs(2, 57, 5, 1) | {"rule": WeightRule(top_ratio=ratio)}
    output, (_, counts) = tir_kernels.reweighted_attention(q, k, v, **given, return_weights=True)
    assert (counts.sum(1) == 5 * int(56 * ratio)).all()
    assert torch.equal(output, tir_kernels.reweighted_attention(q, k, v, **given))


def test_nothing_but_relevance_and_counts_is_written(kernels, monkeypatch) -> None:
    """The fused path makes no weights: outputs, row statistics, (B, C, N) and (B, N), no more."""
    q, k, v, _, _ = draw(2, 2, 40, 64, torch.float32, 9)
    given = token_inputs(2, 40, 5, 1)
    made = cuda_emulation.shapes_made(monkeypatch)
    tir_kernels.reweighted_attention(q, k, v, **given)
    assert sorted(made) == sorted([(2, 2, 40, 64), (2, 2, 40), (2, 5, 39), (2, 39)])


def test_nan_where_nothing_attends_stays_there(kernels) -> None:
    q, k, v, weights, grad_output = draw(1, 1, 60, 64, torch.bfloat16, 10)
    k, v = k.clone(), v.clone()
    ignored = weights[0] <= 0
    k[:, :, ignored], v[:, :, ignored] = math.nan, math.inf
    output, grad_q, grad_k, grad_v, _ = run(q, k, v, weights, grad_output)
    for result in (output, grad_q, grad_k, grad_v):
        assert result.isfinite().all()


# What the emulation notices, and what the tests notice through it. Each edit of the kernels is a
# mistake that a GPU may well forgive on the day it is made.
MISTAKES = {
    "none": ("attention_forward.cu", "", ""),
    "a barrier is missing": (
        "attention_forward.cu",
        "filled next.\n        __syncthreads();\n",
        "filled next.\n",
    ),
    "copies are not waited for": (
        "attention_forward.cu",
        "if (is_loading || chunk == 0) wait_for_copies<0>();",
        "if (is_loading || chunk == 0) wait_for_copies<1>();",
    ),
    "the mask is off by one": (
        "attention_forward.cu",
        "if (j < length) weight = key_weight(",
        "if (j <= length) weight = key_weight(",
    ),
    "fragments are swapped": (
        "tile.cuh",
        "multiply_add<T>(total[m][2 * c + 1], a[m], b[2], b[3]);",
        "multiply_add<T>(total[m][2 * c + 1], a[m], b[3], b[2]);",
    ),
    "half of the rows are forgotten": (
        "tile.cuh",
        "a[m][1] = pack<T>(left[m][j][2], left[m][j][3]);",
        "a[m][1] = pack<T>(left[m][j][0], left[m][j][1]);",
    ),
}


def build_with(mistake: str, folder: Path) -> Path:
    """The emulated module with one of the mistakes in it."""
    return cuda_emulation.build_with(MISTAKES[mistake], "attention_forward", "bfloat16", folder)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake: str, tmp_path: Path) -> None:
    true = cuda_emulation.register()
    faulty = cuda_emulation.EmulatedBackend(cuda_emulation.load(build_with(mistake, tmp_path)))
    q, k, v, weights, _ = draw(2, 1, 130, 64, torch.bfloat16, 11)
    weights = weights.abs() + 0.5
    inputs = AttentionInputs(q, k, v, weights, 0.125)
    expected = true.attention_forward(inputs)
    caught = False
    for order in (0, 1, 2):
        faulty.kernels.set_thread_order(order)
        try:
            results = faulty.attention_forward(inputs)
        except RuntimeError:
            caught = True
        else:
            caught |= not all(map(torch.equal, results, expected))
    assert caught == (mistake != "none")


def run_sanitized(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with kernels that are compiled to notice stray accesses."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        runtimes.append(done.stdout.strip())
        if not Path(runtimes[-1]).is_absolute():
            pytest.skip(f"the compiler came without {name}")
    environment = os.environ | {
        "TIR_EMULATION_SANITIZE": "1",
        "TIR_EMULATION_ORDER": "2",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until it ends
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'python_tests'}",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )


def sanitized_result(name: str, *tests: str) -> Path:
    """Where a run under sanitizers leaves that it passed; it depends on all that it imports."""
    helpers = ("conftest", "cuda_emulation", "oracle", "statistics_oracle", "proofs")
    names = [*(f"{name}.py" for name in helpers), "golden", "backends"]
    files = proofs.sources(*(f"python_tests/{name}" for name in names), *tests)
    files += proofs.cuda_sources() + proofs.operator_sources()
    flags = cuda_emulation.flags_for(Path("csrc"))
    versions = (proofs.version_of("g++"), sys.version, torch.__version__)
    return proofs.place(f"sanitized-{name}", [*files, *proofs.operator_sources()], flags, *versions)


# Python and PyTorch take long to start under sanitizers: two halves, one for each of two workers.
SANITIZED = {
    "attention": ["test_attention.py"],
    "others": [
        "test_token_weights.py",
        "backends/test_cuda_backward.py",
        "backends/test_cuda_emulated.py",
        "backends/test_cuda_queries.py",
        "backends/test_cuda_relevance.py",
        "backends/test_cuda_statistics.py",
    ],
}


@pytest.mark.parametrize("half", SANITIZED)
def test_under_address_and_undefined_behaviour_sanitizers(half: str) -> None:
    """The operators' tests, small."""
    if cuda_emulation.is_sanitized():
        pytest.skip("this is such a run")
    chosen = "(cuda-emulated or test_cuda) and not (mistakes or order or stray or test_sizes)"
    options = ["-v", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    files = [f"python_tests/{name}" for name in SANITIZED[half]]
    with proofs.once(sanitized_result(half, *files)):
        done = run_sanitized(["-m", "pytest", *options, *files])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        for file in files:
            assert re.search(rf"^{file}::\S.* PASSED", done.stdout, re.MULTILINE), file


STRAY_READ = """
import sys, torch, cuda_emulation
from pathlib import Path
from backends.test_cuda_emulated import build_with
from tir_kernels.backends.inputs import AttentionInputs
q = torch.randn(1, 1, 50, 64).bfloat16()
for module in (cuda_emulation.build(), build_with("the mask is off by one", Path(sys.argv[1]))):
    backend = cuda_emulation.EmulatedBackend(cuda_emulation.load(module))
    backend.attention_forward(AttentionInputs(q, q, q, torch.ones(1, 50), 0.125))
    print("ran to the end", flush=True)
"""


def test_the_sanitizer_sees_a_stray_read(tmp_path: Path) -> None:
    if cuda_emulation.is_sanitized():
        pytest.skip("starts such a run")
    with proofs.once(sanitized_result("stray-read")):
        done = run_sanitized(["-c", STRAY_READ, str(tmp_path)])
        assert done.stdout.count("ran to the end") == 1, done.stderr
        assert "heap-buffer-overflow" in done.stderr
        assert done.returncode != 0
