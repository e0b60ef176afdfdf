"""Every operator, forward and backward, on small odd shapes: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m bench.sanitizer_cases [BACKEND...]

Without a backend those run that can. Results are compared with the reference backend, so that
kernels that do nothing do not pass; it runs on the CPU, where the tool does not watch it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

import tir_kernels
from tir_kernels import JointSpace, WeightRule

BACKENDS = ("cuda", "triton")
# B, H, L, d. Heads that tile badly, lengths beside the multiples of 16 and of 64, one longer than a
# whole row.
ATTENTION_SHAPES = ((2, 3, 50, 64), (1, 2, 17, 80), (1, 1, 1, 64), (1, 1, 131, 72))
LONG_ROW = (1, 1, 1030, 64)
# Heads enough for blocks of four warps on a GPU of 132 multiprocessors.
FOUR_WARPS = ((11, 12, 197, 64), (6, 12, 577, 80), (4, 12, 730, 72))
# Backward, the first of these has blocks of whole heads, on such a GPU; so has this one, in which
# the queries pass them twice; and so have wider ones, once and twice.
TWO_SWEEPS = (5, 12, 257, 64)
WIDE_HEADS = ((8, 12, 197, 72), (8, 12, 257, 80))
WIDTHS_OF_TOKENS = ((64, 32, 3), (96, 48, 5))  # D, E, C
WHOLE_SHAPES = ((2, 2, 18, 32), (1, 2, 50, 48))
DTYPES = (torch.bfloat16, torch.float32)
_ALLOWED = {torch.bfloat16: 3e-2, torch.float32: 4e-3}

Shape = Sequence[int]
Pairs = list[tuple[Tensor, Tensor]]  # results, and what they should be


def run_attention(backend: str, shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Pairs:
    """Output, gradients and statistics, of views into a packed projection, with weights of zero
    among them.
    """

    def run(backend: str, device: str) -> list[Tensor]:
        torch.manual_seed(0)
        batch, heads, length, width = shape
        packed = torch.randn(batch, length, 3, heads, width).to(device, dtype)
        leaves = [part.requires_grad_() for part in packed.permute(2, 0, 3, 1, 4).unbind(0)]
        weights = torch.rand(batch, length)
        weights[:, 1::5] = 0.0
        weights = weights.to(device).requires_grad_()
        output = tir_kernels.weighted_attention(*leaves, weights, backend=backend)
        grad_output = torch.randn(output.shape).to(device, dtype)
        statistics = tir_kernels.attention_statistics(*leaves[:2], weights, backend=backend)
        return [output, *torch.autograd.grad(output, [*leaves, weights], grad_output), *statistics]

    return list(zip(run(backend, device), run("reference", "cpu"), strict=True))


def run_whole(backend: str, shape: Shape, dtype: torch.dtype, device: str = "cuda") -> Pairs:
    """Relevance, weights, and the re-weighted attention with its gradients."""
    torch.manual_seed(0)
    batch, heads, length, head_dim, width, joint_width, num_classes = shape

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes).to(device, dtype)

    tokens, classes = random(batch, length, width), random(num_classes, joint_width)
    parts = (random(width), random(width), 1e-5, random(width, joint_width))
    options = {"joint_space": JointSpace(*parts), "backend": backend}
    relevance = tir_kernels.token_relevance(tokens, classes, **options)
    given, _ = tir_kernels.token_weights(tokens, classes, **options)
    rule = WeightRule()
    table = rule.table(num_classes).to(device).requires_grad_()
    leaves = [random(batch, heads, length, head_dim).requires_grad_() for _ in range(3)]
    output, (weights, counts) = tir_kernels.reweighted_attention(
        *leaves, tokens, classes, table=table, return_weights=True, **options
    )
    grads = torch.autograd.grad(output, [*leaves, table], torch.ones_like(output))

    # The reference's own relevance may round to other counts, so it goes on from ours.
    on_cpu = [t.detach().cpu() for t in (tokens, classes)]
    space = JointSpace(*(p.cpu() if isinstance(p, Tensor) else p for p in parts))
    exact_relevance = tir_kernels.token_relevance(*on_cpu, joint_space=space, backend="reference")
    top_k = int((length - 1) * rule.top_ratio)
    chosen = relevance.cpu().topk(top_k).indices
    exact_counts = torch.zeros(relevance.shape).scatter_(-1, chosen, 1.0).sum(1)
    rows = [leaf.detach().cpu().requires_grad_() for leaf in leaves]
    exact_table = table.detach().cpu().requires_grad_()
    exact_weights = torch.nn.functional.pad(exact_table[exact_counts.long()], (1, 0), value=1.0)
    exact_output = tir_kernels.weighted_attention(*rows, exact_weights, backend="reference")
    exact_grads = torch.autograd.grad(
        exact_output, [*rows, exact_table], torch.ones_like(exact_output)
    )
    results = [relevance, given, weights, counts, output, *grads]
    expected = [exact_relevance, exact_weights, exact_weights, exact_counts, exact_output]
    return list(zip(results, [*expected, *exact_grads], strict=True))


def compare(name: str, pairs: Pairs, dtype: torch.dtype) -> None:
    for result, exact in pairs:
        result, exact = result.detach().cpu().double(), exact.detach().double()
        norm = exact.norm().clamp(min=1e-3)  # of one token, some gradients are all zero
        distance = ((result - exact).norm() / norm).item()
        if not distance <= _ALLOWED[dtype]:  # NaN does not pass
            raise AssertionError(f"{name}: off by {distance:.2g}")


def main(wanted: Sequence[str]) -> int:
    if unknown := set(wanted) - set(BACKENDS):
        print(f"sanitizer_cases: {unknown.pop()!r} is none of {', '.join(BACKENDS)}")
        return 2
    if not torch.cuda.is_available():
        print("sanitizer_cases: no CUDA device is visible", file=sys.stderr)
        return 2
    reasons = {name: tir_kernels.available_backends()[name] for name in wanted or BACKENDS}
    for backend, reason in reasons.items():
        if reason:
            print(f"without {backend}: {reason}")
    usable = [backend for backend, reason in reasons.items() if not reason]
    small = [(*s, *t) for s, t in zip(WHOLE_SHAPES, WIDTHS_OF_TOKENS, strict=True)]
    wide = [(*shape, *WIDTHS_OF_TOKENS[1]) for shape in FOUR_WARPS]
    cases = [
        *itertools.product([run_attention], ATTENTION_SHAPES, DTYPES),
        *itertools.product(
            [run_attention], (LONG_ROW, *FOUR_WARPS, TWO_SWEEPS, *WIDE_HEADS), DTYPES[:1]
        ),
        *itertools.product([run_whole], small, DTYPES),
        *itertools.product([run_whole], wide, DTYPES[:1]),
    ]
    for (run, shape, dtype), backend in itertools.product(cases, usable):
        name = f"{backend} {run.__name__} {shape} {dtype}"
        compare(name, run(backend, shape, dtype), dtype)
        print(name, "ok", flush=True)
    torch.cuda.synchronize()
    return 0 if len(usable) == len(reasons) or (usable and not wanted) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
