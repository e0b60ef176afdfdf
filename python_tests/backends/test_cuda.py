"""The CUDA backend on a GPU: blocks of several warps, streams, graphs, devices, threads."""

from __future__ import annotations

import threading

import oracle
import pytest
import statistics_oracle
import torch
from torch import Tensor

import tir_kernels
from tir_kernels.backends.inputs import AttentionInputs
from tir_kernels.operators.choose import choose_backend, load_backend

pytestmark = pytest.mark.gpu

# B, H, L, d for which blocks have four warps on a GPU of 108 or 132 multiprocessors; in the first,
# on one of 132, keys stay in shared memory for several rounds of rows. Backward, heads of width 64
# have a block each; in the last of them queries pass it twice.
FOUR_WARPS = [
    *((22, 12, 197, 64), (11, 12, 197, 64), (6, 12, 257, 64)),
    *((6, 12, 577, 80), (4, 12, 730, 72)),
]
SMALL = (2, 3, 70, 64)


@pytest.fixture(autouse=True)
def needs_backend() -> None:
    if reason := load_backend("cuda").unavailable():
        pytest.skip(f"backend cuda: {reason}")


def draw(
    shape: tuple[int, int, int, int], device: str | torch.device = "cuda"
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v as views of a packed projection, weights of which some are 0 or less, grad_output."""
    torch.manual_seed(0)
    batch, heads, length, width = shape
    packed = torch.randn(batch, length, 3, heads, width).to(device, torch.bfloat16)
    weights = torch.rand(batch, length) * 2
    weights[:, ::5], weights[:, 3::7] = 0.0, -1.0
    grad_output = torch.randn(shape).to(device, torch.bfloat16)
    return list(packed.permute(2, 0, 3, 1, 4)), weights.to(device), grad_output


def run(inputs: tuple[list[Tensor], Tensor, Tensor]) -> list[Tensor]:
    """Output, gradients of query, key, value and weights, and the statistics."""
    rows, weights, grad_output = inputs
    leaves = [t.detach().requires_grad_() for t in (*rows, weights)]
    output = tir_kernels.weighted_attention(*leaves, backend="cuda")
    statistics = tir_kernels.attention_statistics(*rows[:2], weights, backend="cuda")
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output), *statistics]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(result.cpu(), other.cpu())


@pytest.mark.parametrize("shape", FOUR_WARPS, ids=str)
def test_blocks_of_four_warps(shape: tuple[int, int, int, int], poisoned_outputs) -> None:
    (q, k, v), weights, grad_output = inputs = draw(shape)
    scale = q.shape[3] ** -0.5
    *ours, received_from_prefix, received_from_patches, entropy, log_sum_exp = run(inputs)
    oracle.assert_attention_as_accurate(ours, q, k, v, weights, scale, grad_output)
    statistics = tir_kernels.AttentionStatistics(
        received_from_prefix, received_from_patches, entropy, log_sum_exp
    )
    statistics_oracle.assert_statistics_as_accurate(statistics, q, k, weights, 1, scale)


@pytest.mark.parametrize("shape", FOUR_WARPS, ids=str)
def test_blocks_of_four_warps_find_weights(
    shape: tuple[int, int, int, int], poisoned_outputs
) -> None:
    """As if they had been given, and none is written past the room for them."""
    (q, k, v), _, _ = draw(shape)
    batch, _, length, width = shape
    tokens = torch.randn(batch, length, 32, device="cuda")
    classes = torch.randn(5, 32, device="cuda")
    given = {"tokens": tokens, "class_embeddings": classes, "backend": "cuda"}
    output, (weights, counts) = tir_kernels.reweighted_attention(
        q, k, v, **given, return_weights=True
    )
    expected_weights, expected_counts = tir_kernels.token_weights(**given)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(weights, expected_weights)
    expected = tir_kernels.weighted_attention(q, k, v, weights, backend="cuda")
    assert torch.equal(output, expected)
    doubles = AttentionInputs(*(t.double() for t in (q, k, v, weights)), width**-0.5)
    exact, _ = oracle.REFERENCE.attention_forward(doubles)
    plain = oracle.plain_attention(q, k, v, weights, width**-0.5)
    oracle.assert_as_accurate("output", output, plain, exact)


def test_the_current_stream_is_used() -> None:
    inputs = draw(SMALL)
    expected = run(inputs)
    stream = torch.cuda.Stream()
    q = inputs[0][0]
    late = torch.full_like(q, torch.nan)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on another stream reads q before it is there
        late.copy_(q)
        results = run(([late, *inputs[0][1:]], *inputs[1:]))
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(results, expected)


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_forward_and_backward_in_a_graph(mode: str) -> None:
    inputs = draw(SMALL)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        results = run(inputs)
    others, _, _ = draw(SMALL)
    for rows, other in zip(inputs[0], reversed(others), strict=True):
        rows.copy_(other)
    graph.replay()
    assert_same(results, run(inputs))


def test_a_thread_of_its_own() -> None:
    inputs = draw(SMALL)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.extend(run(inputs)))
    thread.start()
    thread.join()
    assert_same(results, run(inputs))


@pytest.mark.parametrize("is_in_a_thread", [False, True])
def test_a_second_device_while_the_first_is_current(is_in_a_thread: bool) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    second = torch.device("cuda", 1)
    if reason := load_backend("cuda").refusal(second):
        pytest.skip(reason)
    results: list[Tensor] = []

    def on_second() -> None:
        with torch.cuda.device(0):
            results.extend(run(draw(SMALL, second)))
            assert torch.cuda.current_device() == 0

    if is_in_a_thread:
        thread = threading.Thread(target=on_second)
        thread.start()
        thread.join()
    else:
        on_second()
    assert {result.device for result in results} == {second}
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert_same(results, run(draw(SMALL)))


def test_auto_takes_it() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert choose_backend("auto", "attention_forward", device, torch.float32).name == "cuda"
