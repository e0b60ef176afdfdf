"""The CPU backend beside plain PyTorch: time ratios and peak memory, measured in one process.

    python bench/cpu_targets.py --help

Both sides run in turn, once per round, so that what else the machine does falls on both; a ratio is
the median over the rounds. Above 1 the CPU backend is the faster one.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from tir_kernels.backends import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFIX = 1


def measure(
    ours: Callable[[], object], theirs: Callable[[], object], seconds: float
) -> list[float]:
    """Median milliseconds of each, and the median ratio of their time to ours."""
    rounds: list[tuple[float, float]] = []
    for function in (ours, theirs):
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds) < 5:
        times = []
        for function in (ours, theirs):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        rounds.append((times[0], times[1]))
    return [
        statistics.median(ours for ours, _ in rounds) * 1e3,
        statistics.median(theirs for _, theirs in rounds) * 1e3,
        statistics.median(theirs / ours for ours, theirs in rounds),
    ]


def packed_heads(
    batch: int, heads: int, length: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    """Query, key and value as views into one packed (B, L, 3, H, d) projection."""
    packed = torch.randn(batch, length, 3, heads, width).to(dtype)
    return [part.requires_grad_() for part in packed.permute(2, 0, 3, 1, 4).unbind(0)]


def attention_pair(
    batch: int, heads: int, length: int, width: int, dtype: torch.dtype, backward: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Weighted attention, and PyTorch's fused attention with log weights as an additive mask."""
    query, key, value = packed_heads(batch, heads, length, width, dtype)
    weights = torch.rand(batch, length) + 0.5
    mask = weights.log()[:, None, None, :].to(dtype)
    scale = width**-0.5
    grad_output = torch.randn(batch, heads, length, width).to(dtype)

    def ours() -> object:
        with torch.no_grad():
            output, log_sum_exp = cpu.attention_forward(query, key, value, weights, scale)
            if not backward:
                return output
            return cpu.attention_backward(
                grad_output, query, key, value, weights, output, log_sum_exp, scale, False
            )

    def theirs() -> object:
        if not backward:
            with torch.no_grad():
                return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return torch.autograd.grad(output, (query, key, value), grad_output)

    return ours, theirs


def eager_attention(
    batch: int, heads: int, length: int, width: int, backward: bool
) -> Callable[[], object]:
    """The formula as it is written down, which holds L x L scores."""
    query, key, value = packed_heads(batch, heads, length, width, torch.float32)
    bias = (torch.rand(batch, length) + 0.5).log()[:, None, None, :]
    grad_output = torch.randn(batch, heads, length, width)

    def run() -> object:
        with torch.set_grad_enabled(backward):
            scores = query @ key.mT * width**-0.5 + bias
            output = scores.softmax(-1) @ value
            del scores
        return torch.autograd.grad(output, (query, key, value), grad_output) if backward else output

    return run


def token_weights_pair(
    batch: int, length: int, width: int, joint_width: int, num_classes: int, dtype: torch.dtype
) -> tuple[Callable[[], object], Callable[[], object]]:
    tokens = torch.randn(batch, length, width).to(dtype)
    classes = torch.randn(1, num_classes, joint_width).to(dtype)
    gain, offset = torch.rand(width).to(dtype), torch.randn(width).to(dtype)
    proj = (torch.randn(width, joint_width) * width**-0.5).to(dtype)
    table = torch.linspace(2, 0, num_classes + 1)
    top_k = int((length - PREFIX) * 0.3)

    @torch.no_grad()
    def ours() -> object:
        return cpu.token_weights(tokens, classes, gain, offset, 1e-5, proj, table, top_k, PREFIX)

    @torch.no_grad()
    def theirs() -> object:
        features = F.layer_norm(tokens[:, PREFIX:], (width,), gain, offset) @ proj
        features = F.normalize(features, dim=-1)
        relevance = F.normalize(classes[0], dim=-1) @ features.mT
        chosen = relevance.topk(top_k, dim=-1).indices
        counts = torch.zeros_like(relevance).scatter_(-1, chosen, 1.0).sum(1)
        middle = (num_classes + 1) / 2
        weights = torch.where(counts == 0, 1.0, 1.0 - 0.5 * (counts - middle))
        return F.pad(weights, (PREFIX, 0), value=1.0)

    return ours, theirs


def _kibibytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


def _report_peak(sender, name: str, length: int, side: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)

    def prepare(size: int) -> Callable[[], object]:
        if name == "token_weights":
            return token_weights_pair(8, size, 768, 512, 5, torch.float32)[side]
        backward = name.endswith("backward")
        if side == 2:
            return eager_attention(8, 12, size, 64, backward)
        return attention_pair(8, 12, size, 64, torch.float32, backward)[side]

    prepare(8)()  # what is loaded or started once
    function = prepare(length)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = _kibibytes("VmRSS")
    result = function()
    sender.send((_kibibytes("VmHWM") - before) / 1024)
    del result


def added_memory(name: str, length: int, side: int) -> float:
    """MiB that one call adds to the peak memory of a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, name, length, side))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    return peak


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Measuring time per row.")
@click.option("--lengths", default="50,197,257,577,1024", show_default=True)
@click.option("--widths", default="64,80,128", show_default=True, help="Widths of a head.")
@click.option("--heads", default="96,12", show_default=True, help="Batch times heads.")
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--only", type=click.Choice(["attention", "token_weights", "memory"]))
def main(
    threads: int,
    seconds: float,
    lengths: str,
    widths: str,
    heads: str,
    dtypes: str,
    only: str | None,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    click.echo(f"torch {torch.__version__}, cpu backend: {cpu.description()}")
    if only in (None, "token_weights"):
        click.echo("\ntoken_weights, B=8 D=768 E=512 C=5; ms ours, ms PyTorch, ratio")
        for dtype in dtypes.split(","):
            for length in (50, 197, 577):
                pair = token_weights_pair(8, length, 768, 512, 5, DTYPES[dtype])
                ours, theirs, ratio = measure(*pair, seconds)
                click.echo(f"{dtype:9} L={length:<5} {ours:9.3f} {theirs:9.3f} {ratio:6.2f}x")
    if only in (None, "attention"):
        click.echo("\nweighted_attention beside scaled_dot_product_attention with a mask")
        click.echo("forward: ms ours, ms PyTorch, ratio; then forward + backward")
        for dtype in dtypes.split(","):
            for width in map(int, widths.split(",")):
                for head_count in map(int, heads.split(",")):
                    for length in map(int, lengths.split(",")):
                        batch = max(head_count // 12, 1)
                        shape = (batch, head_count // batch, length, width)
                        row = f"{dtype:9} d={width:<4} B*H={head_count:<4} L={length:<5}"
                        for backward in (False, True):
                            pair = attention_pair(*shape, DTYPES[dtype], backward)
                            ours, theirs, ratio = measure(*pair, seconds)
                            row += f" {ours:9.3f} {theirs:9.3f} {ratio:6.2f}x"
                        click.echo(row)
    if only in (None, "memory"):
        click.echo("\nMiB added to the peak at L=1024, B=8, 12 heads, d=64, float32, outputs")
        click.echo("included: ours, PyTorch's fused attention, PyTorch as the formula is written")
        for name in ("attention forward", "attention forward + backward"):
            ours, fused, eager = (added_memory(name, 1024, side) for side in (0, 1, 2))
            click.echo(f"{name:30} {ours:9.1f} {fused:9.1f} {eager:9.1f}")
        ours, eager = (added_memory("token_weights", 1024, side) for side in (0, 1))
        click.echo(f"{'token_weights':30} {ours:9.1f} {'':9} {eager:9.1f}")


if __name__ == "__main__":
    main()
