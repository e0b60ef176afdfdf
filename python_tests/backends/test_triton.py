"""The Triton backend against the reference in float64, interpreted or on a GPU.

The bound on an error is relative to plain PyTorch: twice what the same formula gives with plain
operations in the same type, plus one rounding step.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

pytest.importorskip("triton", reason="Triton is not installed")

import oracle

from tir_kernels.backends import reference
from tir_kernels.backends.protocol import AttentionInputs, RelevanceInputs
from tir_kernels.backends.triton import TritonBackend, interpreter_is_on
from tir_kernels.backends.triton.kernels.selection import select_and_weigh

BACKEND = TritonBackend()
INTERPRETED = interpreter_is_on()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


ONLY_DEVICE = (
    pytest.param("cpu", id="interpreted", marks=pytest.mark.slow)
    if INTERPRETED
    else pytest.param("cuda", marks=pytest.mark.gpu)
)


@pytest.fixture(params=[ONLY_DEVICE])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels of this process run: a process either compiles or interprets them."""
    return request.param


@pytest.fixture
def cuda() -> str:
    if INTERPRETED:
        pytest.skip("no CUDA device, or TRITON_INTERPRET is set")
    return "cuda"


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_inputs(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Views of one packed projection, a strided gradient, and weights of which some are <= 0."""
    packed = random_tensor(batch, length, 3, heads, head_dim, dtype=dtype, seed=length).to(device)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    grad_output = random_tensor(batch, length, heads, head_dim, dtype=dtype, seed=1).to(device)
    weights = random_tensor(batch, length, seed=2).to(device) * 0.7 + 1.0
    weights[:, 1::7] = 0.0
    return query, key, value, grad_output.transpose(1, 2), weights


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> list[Tensor]:
    """Output, log-sum-exp and gradients by plain operations in the type of the inputs."""
    ignored = (weights <= 0)[:, None, None, :]
    factors = weights.to(query.dtype)[:, None, None, :].masked_fill(ignored, 0.0)
    scores = query @ key.mT * scale
    log_sums = (scores + factors.log()).logsumexp(-1, keepdim=True)
    per_weight = (scores - log_sums).exp()
    probabilities = per_weight * factors
    output = probabilities @ value
    delta = (grad_output * output).sum(-1, keepdim=True)
    grad_per_weight = per_weight * (grad_output @ value.mT - delta)
    grad_scores = grad_per_weight * factors
    return [
        output,
        log_sums[..., 0],
        grad_scores @ key * scale,
        grad_scores.mT @ query * scale,
        probabilities.mT @ grad_output,
        grad_per_weight.sum((1, 2)).masked_fill(weights < 0, 0.0),
    ]


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> list[Tensor]:
    doubles = AttentionInputs(*(t.double() for t in (query, key, value, weights)), scale)
    return list(oracle.run_attention(oracle.REFERENCE, doubles, grad_output.double()))


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, weights: Tensor, scale: float
) -> list[Tensor]:
    inputs = AttentionInputs(query, key, value, weights, scale)
    return list(oracle.run_attention(BACKEND, inputs, grad_output))


def assert_as_exact_as_plain(ours: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    step = torch.finfo(ours.dtype).eps
    for statistic in (torch.Tensor.amax, torch.Tensor.mean):
        error = statistic((ours.double() - exact).abs()).item()
        allowed = 2 * statistic((plain.double() - exact).abs()) + step * statistic(exact.abs())
        assert error <= allowed.item(), f"{name}: {statistic.__name__} error {error:.2e}"


def check_attention(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    inputs = attention_inputs(batch, heads, length, head_dim, dtype, device)
    scale = head_dim**-0.5
    results = run_attention(*inputs, scale)
    assert results[0].is_contiguous()
    assert [t.dtype for t in results] == [dtype, torch.float32, *3 * [dtype], torch.float32]
    names = ("output", "log_sum_exp", "grad_query", "grad_key", "grad_value", "grad_weights")
    plain, exact = plain_attention(*inputs, scale), exact_attention(*inputs, scale)
    for name, ours, other, true in zip(names, results, plain, exact, strict=True):
        assert ours.shape == true.shape
        assert_as_exact_as_plain(ours, other, true, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "head_dim"), [(50, 64), (50, 72), (33, 80), (70, 17), (1, 1)])
def test_attention(length: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    check_attention(2, 1, length, head_dim, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_many_blocks(dtype: torch.dtype, device: str) -> None:
    check_attention(1, 1, 197, 64, dtype, device)


@pytest.mark.parametrize("head_dim", [3, 64, 72, 80, 88, 96, 104, 112, 128, 160, 256])
def test_attention_of_every_head_dim(head_dim: int, device: str) -> None:
    check_attention(1, 2, 20, head_dim, torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 88, 96, 104, 112, 128, 256])
@pytest.mark.parametrize("length", [50, 197, 257, 577, 1100])
def test_attention_on_gpu(length: int, head_dim: int, dtype: torch.dtype, cuda: str) -> None:
    check_attention(2, 3, length, head_dim, dtype, cuda)


@pytest.mark.gpu
def test_attention_of_many_heads_and_long_rows(cuda: str) -> None:
    check_attention(1, 2, 4096, 64, torch.bfloat16, cuda)
    check_attention(70_000, 1, 5, 16, torch.float32, cuda)


@pytest.mark.gpu
def test_current_stream_is_used(cuda: str) -> None:
    inputs = attention_inputs(2, 2, 197, 64, torch.float32, cuda)
    expected = run_attention(*inputs, 0.125)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        inputs[0].mul_(2.0)
        inputs[0].mul_(0.5)
        results = run_attention(*inputs, 0.125)
    torch.cuda.current_stream().wait_stream(stream)
    for ours, other in zip(results, expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_unattended_keys_do_not_leak(bad: float, device: str) -> None:
    query, key, value, grad_output, weights = attention_inputs(2, 1, 40, 24, torch.float32, device)
    weights[0, 3] = -1.0
    scale = 24**-0.5
    expected = run_attention(query, key, value, grad_output, weights, scale)
    key, value = key.clone(), value.clone()
    for tensor in (key, value):
        tensor.masked_fill_((weights <= 0)[:, None, :, None], bad)
    results = run_attention(query, key, value, grad_output, weights, scale)
    for ours, other in zip(results[:5], expected[:5], strict=True):
        assert torch.equal(ours, other)
    assert torch.equal(results[5][weights != 0], expected[5][weights != 0])
    ignored = (weights <= 0)[:, None, :, None].expand_as(key)
    assert (results[3][ignored] == 0).all()
    assert (results[4][ignored] == 0).all()
    assert results[5][0, 3] == 0


def test_nan_weights_show_and_stay_in_their_image(device: str) -> None:
    inputs = attention_inputs(2, 1, 40, 16, torch.float32, device)
    expected = run_attention(*inputs, 0.25)
    inputs[4][0, 5] = NAN
    results = run_attention(*inputs, 0.25)
    exact = exact_attention(*inputs, 0.25)
    for ours, before, true in zip(results, expected, exact, strict=True):
        assert torch.equal(ours[1], before[1])
        assert torch.equal(ours[0].isnan(), true[0].isnan())
        assert ours[0].isnan().any()


def test_rows_without_attended_keys(device: str) -> None:
    query, key, value, grad_output, weights = attention_inputs(2, 2, 20, 16, torch.float16, device)
    weights[0] = torch.where(torch.arange(20, device=device) % 2 == 0, 0.0, -2.0)
    results = run_attention(query, key, value, grad_output, weights, 0.25)
    assert (results[1][0] == -INF).all()
    for index, result in enumerate(results):
        assert index == 1 or (result[0] == 0).all()
        assert result[1].isfinite().all()


@pytest.mark.parametrize("magnitude", [1.0, 12.0])
def test_weight_gradient_has_its_limit_at_zero(magnitude: float, device: str) -> None:
    """Also where exp(score - log_sum_exp) overflows float32 and is held at exp(88)."""
    query, key, value, grad_output, weights = attention_inputs(1, 2, 20, 16, torch.float32, device)
    query, key = query * magnitude, key.clone()
    key[:, :, 8] = query[:, :, 8]
    weights[:, 8] = 0.0
    inputs = (query, key, value, grad_output * 0.01, weights)
    results, exact = run_attention(*inputs, 1.0), exact_attention(*inputs, 1.0)
    assert exact[5][0, 8].abs() > (1e30 if magnitude > 1 else 1e-6)
    torch.testing.assert_close(results[5], exact[5].float(), rtol=1e-4, atol=1e-4)
    for ours in results:
        assert ours.isfinite().all()


def test_tiny_weights_in_float16(device: str) -> None:
    """1 / weight exceeds float16's range; no product may."""
    query, key, value, grad_output, weights = attention_inputs(1, 1, 20, 16, torch.float16, device)
    weights[:, 2] = 1e-7
    inputs = (query, key, value, grad_output, weights)
    for ours, true in zip(
        run_attention(*inputs, 0.25), exact_attention(*inputs, 0.25), strict=True
    ):
        torch.testing.assert_close(ours.double(), true, rtol=2e-2, atol=5e-3)


def test_any_strides(device: str) -> None:
    """Heads that share their keys, an expanded gradient, and every other row of a longer tensor."""
    query = random_tensor(2, 80, 3, 24).to(device)[:, ::2].transpose(1, 2)
    key = random_tensor(2, 1, 40, 27, seed=1).to(device)[..., 3:].expand(2, 3, 40, 24)
    value = random_tensor(1, 3, 40, 24, seed=2).to(device).expand(2, 3, 40, 24)
    grad_output = random_tensor(24, seed=3).to(device).expand(2, 3, 40, 24)
    weights = random_tensor(40, 2, seed=4).to(device).abs().T
    strided = (query, key, value, grad_output, weights)
    contiguous = [tensor.contiguous() for tensor in strided]
    for ours, other in zip(
        run_attention(*strided, 0.2), run_attention(*contiguous, 0.2), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-6)


def test_weight_gradient_only_if_asked(device: str) -> None:
    query, key, value, grad_output, weights = attention_inputs(1, 2, 20, 16, torch.float32, device)
    inputs = AttentionInputs(query, key, value, weights, 0.25)
    *with_weights, _ = oracle.run_attention(BACKEND, inputs, grad_output, True)
    *without, no_grad_weights = oracle.run_attention(BACKEND, inputs, grad_output, False)
    assert no_grad_weights.shape == (0,)
    for ours, other in zip(without, with_weights, strict=True):
        assert torch.equal(ours, other)


def test_heads_too_wide_are_refused(device: str) -> None:
    query, key, value, _, weights = attention_inputs(1, 1, 2, 257, torch.float32, device)
    with pytest.raises(ValueError, match="at most 256; got 257"):
        BACKEND.attention_forward(AttentionInputs(query, key, value, weights, 1.0))


# Relevance


def relevance_inputs(
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    length: int = 50,
    width: int = 72,
    features: int = 40,
    classes: int = 5,
    groups: int = 1,
    norm: bool = True,
    proj: bool = True,
    prefix: int = 1,
) -> RelevanceInputs:
    features = features if proj else width
    return RelevanceInputs(
        (random_tensor(batch, length, width) * 2 + 3).to(dtype).to(device),
        random_tensor(groups, classes, features, dtype=dtype, seed=1).to(device),
        (random_tensor(width, seed=2) * 0.2 + 1).to(dtype).to(device) if norm else None,
        random_tensor(width, dtype=dtype, seed=3).to(device) if norm else None,
        1e-5 if norm else None,
        (random_tensor(width, features, seed=4) * width**-0.5).to(dtype).to(device)
        if proj
        else None,
        prefix,
    )


def plain_relevance(inputs: RelevanceInputs) -> Tensor:
    """The formula in the type of the tokens, but for the cosine's quotient."""
    tokens, classes, norm_weight, norm_bias, norm_eps, proj, prefix = inputs
    features = tokens[:, prefix:]
    if norm_eps is not None:
        features = torch.nn.functional.layer_norm(
            features, features.shape[-1:], norm_weight, norm_bias, norm_eps
        )
    if proj is not None:
        features = features @ proj
    grouped = features.unflatten(0, (classes.shape[0], -1))
    products = (grouped @ classes.mT[:, None]).flatten(0, 1).mT
    class_norms = classes.norm(dim=-1)[:, None].expand(-1, grouped.shape[1], -1).flatten(0, 1)
    return products.float() / (features.norm(dim=-1)[:, None] * class_norms[..., None]).float()


def check_relevance(inputs: RelevanceInputs) -> None:
    ours = BACKEND.relevance(inputs)
    doubles = (t.double() if isinstance(t, Tensor) else t for t in inputs)
    exact = reference.exact_relevance(RelevanceInputs._make(doubles))
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    assert_as_exact_as_plain(ours, plain_relevance(inputs), exact, "relevance")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"norm": False},
        {"proj": False},
        {"norm": False, "proj": False, "width": 130},
        {"classes": 20, "groups": 2, "prefix": 0},
        {"classes": 1, "prefix": 5, "width": 7, "features": 3},
        {"classes": 130, "length": 3, "features": 140},
    ],
    ids=str,
)
def test_relevance(shape: dict[str, int], dtype: torch.dtype, device: str) -> None:
    check_relevance(relevance_inputs(device, dtype, **shape))  # type: ignore[arg-type]


def test_relevance_of_several_blocks_of_tokens(device: str) -> None:
    check_relevance(relevance_inputs(device, length=197, width=64, batch=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "classes"), [(3, 5), (64, 5), (4, 300)])
def test_relevance_on_gpu(batch: int, classes: int, dtype: torch.dtype, cuda: str) -> None:
    check_relevance(
        relevance_inputs(
            cuda, dtype, batch=batch, classes=classes, length=197, width=768, features=512
        )
    )


def test_relevance_of_any_strides_and_mixed_types(device: str) -> None:
    tokens, classes, gain, offset, eps, proj, prefix = relevance_inputs(device)
    assert gain is not None
    assert offset is not None
    assert proj is not None
    inputs = RelevanceInputs(tokens, classes, gain.bfloat16(), offset, eps, proj.bfloat16(), prefix)
    expected = BACKEND.relevance(inputs)
    strided = BACKEND.relevance(
        inputs._replace(
            tokens=tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            class_embeddings=classes.mT.contiguous().mT,
            norm_weight=gain.bfloat16().repeat_interleave(2)[::2],
            proj=proj.bfloat16().T.contiguous().T,
        )
    )
    torch.testing.assert_close(strided, expected, rtol=1e-5, atol=1e-6)
    doubles = (t.double() if isinstance(t, Tensor) else t for t in inputs)
    exact = reference.exact_relevance(RelevanceInputs._make(doubles))
    torch.testing.assert_close(expected.double(), exact, rtol=1e-4, atol=1e-5)


def test_relevance_keeps_nan_in_its_token_and_class(device: str) -> None:
    inputs = relevance_inputs(device)
    expected = BACKEND.relevance(inputs)
    inputs[0][1, 8, 3] = NAN
    inputs[1][0, 2, 1] = NAN
    result = BACKEND.relevance(inputs)
    is_nan = torch.zeros_like(result, dtype=torch.bool)
    is_nan[1, :, 7] = True
    is_nan[:, 2] = True
    assert torch.equal(result.isnan(), is_nan)
    assert torch.equal(result[~is_nan], expected[~is_nan])


# Selection


def check_selection(scores: Tensor, top_k: int, prefix: int) -> None:
    table = random_tensor(scores.shape[1] + 1, seed=9).to(scores.device)
    weights, counts = select_and_weigh(scores, table, top_k, prefix)
    expected = reference.count_selections(scores, top_k)
    assert counts.dtype == torch.int32
    assert torch.equal(counts, expected)
    assert torch.equal(weights, reference.look_up_weights(expected, table, prefix))


def ragged_scores(batch: int, classes: int, patches: int, seed: int = 0) -> Tensor:
    """Many ties, both zeros, infinities and NaN, and one class of nothing but NaN."""
    scores = (random_tensor(batch, classes, patches, seed=seed) * 3).round()
    kinds = random_tensor(batch, classes, patches, seed=seed + 1)
    scores = torch.where(kinds > 1.3, NAN, scores)
    scores = torch.where(kinds < -1.8, torch.copysign(torch.tensor(INF), scores), scores)
    scores[-1, -1] = NAN
    scores[scores == 0] *= torch.where(kinds[scores == 0] > 0, 1.0, -1.0)
    return scores


@pytest.mark.parametrize(
    ("classes", "patches", "top_k", "prefix"),
    [
        (5, 49, 14, 1),
        (5, 196, 58, 1),
        (7, 33, 33, 0),
        (3, 33, 0, 5),
        (1, 1, 1, 1),
        (20, 576, 172, 4),
        (2, 4095, 1228, 1),
    ],
)
def test_selection_is_exact(
    classes: int, patches: int, top_k: int, prefix: int, device: str
) -> None:
    check_selection(ragged_scores(2, classes, patches).to(device), top_k, prefix)


def test_selection_separates_neighbouring_floats(device: str) -> None:
    ladder = torch.arange(-40, 40).to(torch.int32)
    for start in (0.0, 1.0, -1.0, 3e38, 1e-40):
        steps = torch.tensor(start).view(torch.int32) + ladder
        scores = steps.view(torch.float32)[torch.randperm(80)].reshape(1, 1, 80)
        check_selection(scores.to(device), 17, 1)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_selection_of_any_shape(data: st.DataObject) -> None:
    patches = data.draw(st.integers(1, 70))
    scores = ragged_scores(
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 6)),
        patches,
        seed=data.draw(st.integers(0, 1000)),
    )
    scores = scores.to("cpu" if INTERPRETED else "cuda")
    check_selection(scores, data.draw(st.integers(0, patches)), data.draw(st.integers(0, 3)))


@pytest.mark.parametrize("groups", [1, 2])
def test_token_weights(groups: int, device: str) -> None:
    inputs = relevance_inputs(device, groups=groups, batch=4, length=21)
    table = random_tensor(6).to(device)
    weights, counts = BACKEND.token_weights(inputs, table, 6)
    true_weights, true_counts = oracle.REFERENCE.token_weights(inputs, table, 6)
    assert torch.equal(counts, true_counts)
    assert torch.equal(weights, true_weights)


def test_equal_tokens_are_selected_in_order(device: str) -> None:
    """Small integers, so that equal tokens have equal relevance on every backend."""
    tokens = torch.tensor([[4.0, 3.0], [3.0, 4.0], [0.0, 1.0]])[torch.arange(30) % 3]
    classes = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    inputs = RelevanceInputs(tokens[None].to(device), classes.to(device), None, None, None, None, 0)
    table = torch.tensor([1.0, 0.5, 0.0], device=device)
    _, counts = BACKEND.token_weights(inputs, table, 4)
    first, third = counts[0, ::3], counts[0, 2::3]
    assert first.tolist() == third.tolist() == [1, 1, 1, 1, *6 * [0]]
    assert counts.sum() == 8


# All kernels


def run_everything(device: str) -> list[Tensor]:
    results = run_attention(*attention_inputs(2, 2, 50, 24, torch.bfloat16, device), 0.2)
    inputs = relevance_inputs(device)
    results.append(BACKEND.relevance(inputs))
    results += BACKEND.token_weights(inputs, random_tensor(6).to(device), 14)
    return results


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every new tensor is full of NaN, so that a place nobody writes to shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(NAN if tensor.is_floating_point() else -(2**31))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        yield


def test_every_output_is_written(device: str, poisoned_memory: None) -> None:
    for result in run_everything(device):
        assert result.isfinite().all()
        assert (result > -(2**30)).all()


def test_same_inputs_same_bits(device: str) -> None:
    for first, second in zip(run_everything(device), run_everything(device), strict=True):
        assert torch.equal(first, second)


# Availability


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BACKEND.unavailable() == ""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert BACKEND.refusal(cpu) == BACKEND.refusal(gpu) == ""
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "CUDA" in BACKEND.refusal(cpu)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device" in BACKEND.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert BACKEND.unavailable() == BACKEND.refusal(gpu) == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    for reason in (BACKEND.unavailable(), BACKEND.refusal(gpu)):
        assert "Old GPU has compute capability 7.5" in reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install triton" in BACKEND.unavailable()


def test_importing_the_backend_does_not_import_triton() -> None:
    program = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from tir_kernels.operators.choose import load_backend\n"
        "backend = load_backend('triton')\n"
        "backend.unavailable(), backend.refusal(torch.device('cpu'))\n"
        "assert ('triton' in sys.modules) == before\n"
        "assert not before, 'PyTorch imports Triton itself: nothing shown'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
