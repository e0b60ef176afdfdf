"""Every operator, forward and backward, on small odd shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.sanitizer_cases

Results are compared with the reference backend, so that kernels that do nothing do not pass.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch

import tir_kernels
from tir_kernels import JointSpace, WeightRule

BACKENDS = ("cuda", "triton")
# Heads that tile badly, lengths beside the multiples of 16 and of 64, one longer than a whole row.
ATTENTION_SHAPES = ((2, 3, 50, 64), (1, 2, 17, 80), (1, 1, 1, 64), (1, 1, 131, 72))
LONG_ROW = (1, 1, 1030, 64)
RELEVANCE_SHAPES = ((2, 18, 64, 32, 3), (1, 50, 96, 48, 5))  # B, L, D, E, C
DTYPES = (torch.bfloat16, torch.float32)
_ALLOWED = {torch.bfloat16: 3e-2, torch.float32: 4e-3}


def run_attention(backend: str, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients, of views into a packed projection, with weights of zero among them."""
    torch.manual_seed(0)
    batch, heads, length, width = shape
    packed = torch.randn(batch, length, 3, heads, width).to("cuda", dtype)
    leaves = [part.requires_grad_() for part in packed.permute(2, 0, 3, 1, 4).unbind(0)]
    weights = torch.rand(batch, length)
    weights[:, 1::5] = 0.0
    weights = weights.cuda().requires_grad_()
    output = tir_kernels.weighted_attention(*leaves, weights, backend=backend)
    grad_output = torch.randn(output.shape).to("cuda", dtype)
    return [output, *torch.autograd.grad(output, [*leaves, weights], grad_output)]


def run_whole(backend: str, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Relevance, weights, and the re-weighted attention with its gradients."""
    torch.manual_seed(0)
    batch, length, width, joint_width, num_classes = shape
    heads = 2

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes).to("cuda", dtype)

    tokens, classes = random(batch, length, width), random(num_classes, joint_width)
    space = JointSpace(random(width), random(width), 1e-5, random(width, joint_width))
    options = {"joint_space": space, "backend": backend}
    relevance = tir_kernels.token_relevance(tokens, classes, **options)
    weights, _ = tir_kernels.token_weights(tokens, classes, **options)
    table = WeightRule().table(num_classes).cuda().requires_grad_()
    leaves = [random(batch, heads, length, width // heads).requires_grad_() for _ in range(3)]
    output = tir_kernels.reweighted_attention(*leaves, tokens, classes, table=table, **options)
    grads = torch.autograd.grad(output, [*leaves, table], torch.ones_like(output))
    # Counts may differ by rounding, and everything that follows from them: compared is the
    # relevance; the rest has run.
    for result in (weights, output, *grads):
        if not result.isfinite().all():
            raise AssertionError(f"{backend}: a result of reweighted_attention is not finite")
    return [relevance]


def compare(
    name: str,
    results: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    for result, exact in zip(results, expected, strict=True):
        norm = exact.double().norm().clamp(min=1e-3)  # of one token, some gradients are all zero
        distance = ((result.double() - exact.double()).norm() / norm).item()
        if not distance <= _ALLOWED[dtype]:  # NaN does not pass
            raise AssertionError(f"{name}: off by {distance:.2g}")


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitizer_cases: no CUDA device is visible", file=sys.stderr)
        return 2
    reasons = tir_kernels.available_backends()
    for backend in BACKENDS:
        if reasons[backend]:
            print(f"without {backend}: {reasons[backend]}")
    usable = [backend for backend in BACKENDS if not reasons[backend]]
    cases = [
        *itertools.product([run_attention], ATTENTION_SHAPES, DTYPES),
        (run_attention, LONG_ROW, torch.bfloat16),
        *itertools.product([run_whole], RELEVANCE_SHAPES, DTYPES),
    ]
    for run, shape, dtype in cases:
        expected = run("reference", shape, dtype)
        for backend in usable:
            name = f"{backend} {run.__name__} {shape} {dtype}"
            compare(name, run(backend, shape, dtype), expected, dtype)
            print(name, "ok", flush=True)
    torch.cuda.synchronize()
    return 0 if usable else 2


if __name__ == "__main__":
    sys.exit(main())
