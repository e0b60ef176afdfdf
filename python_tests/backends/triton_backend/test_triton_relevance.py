"""Relevance and selection of the Triton backend against the reference in float64."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import (
    BACKEND,
    DTYPES,
    INF,
    INTERPRETED,
    NAN,
    check_relevance,
    random_tensor,
    relevance_inputs,
)

from tir_kernels.backends import reference
from tir_kernels.backends.inputs import RelevanceInputs
from tir_kernels.backends.triton.kernels.selection import select_and_weigh


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


@pytest.mark.slow
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
