"""Attention of the Triton backend against float64, interpreted or on a GPU."""

from __future__ import annotations

import oracle
import pytest
import torch
from triton_cases import (
    BACKEND,
    DTYPES,
    INF,
    NAN,
    attention_inputs,
    check_attention,
    exact_attention,
    random_tensor,
    run_attention,
)

from tir_kernels.backends.inputs import AttentionInputs, StatisticsInputs
from tir_kernels.backends.triton.kernels import (
    attention_backward,
    attention_forward,
    key_weights,
)


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


def test_logarithms_of_weights(device: str) -> None:
    """What does not count gets -inf: too small, 0, negative; NaN stays."""
    ordinary = [1.0, 2.0, 0.3, 2.0**-126, 1e-30, 3e38, INF]
    weights = torch.tensor([[*ordinary, 2.0**-127, 1e-44, 0.0], [-0.0, -1.0, -INF, NAN, *6 * [4]]])
    found = key_weights.log_weights(weights.to(device)).cpu()
    expected = weights.double().log2().float()
    expected[0, len(ordinary) :], expected[1, :3] = -INF, -INF
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=2e-7, equal_nan=True)


def test_no_logarithms_are_made_without_weights(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """And no weights are looked at: what is written for weights of 1 is written without them."""
    query, key, value, grad_output, weights = attention_inputs(2, 1, 70, 16, torch.float32, device)
    given = AttentionInputs(query, key, value, torch.ones_like(weights), 0.25)
    described = StatisticsInputs(query, key, given.weights, 0.25, 1)
    expected = [*oracle.run_attention(BACKEND, given, grad_output, False)]
    expected += BACKEND.attention_statistics(described)
    monkeypatch.setattr(key_weights, "log_weights_kernel", None)
    without = given._replace(weights=None)
    results = [*oracle.run_attention(BACKEND, without, grad_output, False)]
    results += BACKEND.attention_statistics(described._replace(weights=None))
    for ours, other in zip(results, expected, strict=True):
        assert torch.equal(ours, other)
    with pytest.raises(TypeError):  # what was taken away would have been missed
        BACKEND.attention_forward(given)


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


def causal_attention(
    num_queries: int, num_keys: int, device: str
) -> tuple[AttentionInputs, torch.Tensor]:
    """A causal problem of several blocks either way, and a gradient of its output."""
    query, grad_output = (random_tensor(1, 2, num_queries, 16, seed=s).to(device) for s in (0, 1))
    key, value = (random_tensor(1, 2, num_keys, 16, seed=s).to(device) for s in (2, 3))
    weights = random_tensor(1, num_keys, seed=4).to(device).abs()
    return AttentionInputs(query, key, value, weights, 0.25, True), grad_output


def test_blocks_of_keys_that_no_query_sees_are_not_read(device: str) -> None:
    """Within a block a probability of 0 times NaN would be NaN."""
    inputs, grad_output = causal_attention(70, 260, device)
    for tensor in inputs[1:3]:
        tensor[:, :, 192:] = NAN
    key, value, weights = inputs.key[:, :, :192], inputs.value[:, :, :192], inputs.weights[:, :192]
    read = inputs._replace(key=key, value=value, weights=weights)
    expected = oracle.run_attention(BACKEND, read, grad_output)
    results = oracle.run_attention(BACKEND, inputs, grad_output)
    for ours, other in zip(results[:3], expected[:3], strict=True):
        assert torch.equal(ours, other)
    for ours in results[3:5]:
        assert (ours[:, :, 70:] == 0).all()
    assert (results[5][:, 70:] == 0).all()
    found = BACKEND.attention_statistics(StatisticsInputs(*inputs[:2], *inputs[3:5], 1, True))
    for statistic in found:
        assert statistic.isfinite().all()


def test_blocks_of_queries_that_see_no_key_are_not_read(device: str) -> None:
    inputs, grad_output = causal_attention(260, 260, device)
    results = oracle.run_attention(BACKEND, inputs, grad_output)
    for tensor in (inputs.query, grad_output):
        tensor[:, :, :64] = NAN
    others = oracle.run_attention(BACKEND, inputs, grad_output)
    for ours, other in zip(results[3:5], others[3:5], strict=True):
        assert torch.equal(ours[:, :, 64:], other[:, :, 64:])
    assert torch.equal(results[5][:, 64:], others[5][:, 64:])
    assert others[5][:, :64].isnan().any()


# Queries, keys, and the width of heads. 16, 64 and 128 queries in a tile; streamed rows in whole
# blocks, in a rest of 16, 32 or 64 and in both; 32 stationary keys for blocks of 64 queries.
CUTS = [
    ((9, 64, 16), True),
    ((64, 64, 16), False),
    ((70, 48, 16), False),
    ((100, 20, 16), True),
    ((130, 93, 16), True),
    ((70, 70, 160), True),
]


@pytest.mark.parametrize(("shape", "is_causal"), CUTS, ids=str)
def test_every_cut(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], is_causal: bool, device: str
) -> None:
    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "device_capability", lambda device: (9, 0))
    num_queries, num_keys, width = shape
    rows = [
        random_tensor(1, 1, length, width, dtype=torch.bfloat16, seed=seed).to(device)
        for seed, length in enumerate((num_queries, num_keys, num_keys, num_queries))
    ]
    weights = random_tensor(1, num_keys, seed=4).to(device)
    scale, grad_output = width**-0.5, rows.pop()
    inputs = AttentionInputs(*rows, weights, scale, is_causal)
    output, _, *grads = oracle.run_attention(BACKEND, inputs, grad_output)
    arguments = (*rows, weights, scale, grad_output, is_causal)
    oracle.assert_attention_as_accurate((output, *grads), *arguments)


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
