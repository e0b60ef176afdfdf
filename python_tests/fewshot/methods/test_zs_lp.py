"""ZS-LP and CLAP against their gradients in NumPy, and the settings at which they are others."""

import numpy as np
import pytest
import torch
from fewshot.frozen_cases import learn, parts_of, softmax, unit, warmed, with_views
from fewshot.training_cases import EPISODES, make_model

from tir_kernels.fewshot.methods.clap import CLAP
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.methods.zs_lp import ZSLP

LABELS = [pytest.param((0, 0, 1, 1, 2, 2), marks=pytest.mark.slow), (0, 0, 0, 0, 1, 2)]


@pytest.fixture(scope="module")
def model():
    return make_model()


def by_hand(parts, start, penalties, steps):
    """Logits of the queries and losses: the gradient of W is that of its direction, turned."""
    weights, velocity, losses = 10 * start, 0, []
    for rate in warmed(0.1, steps):
        lengths = np.linalg.norm(weights, axis=1, keepdims=True)
        found = softmax(100 * parts.images @ unit(weights).T)
        change = weights - 10 * parts.texts
        loss = -np.log((found * parts.classes).sum(1)).mean()
        losses.append(loss + (penalties * (change**2).sum(1)).mean())
        of_direction = 100 * (found - parts.classes).T @ parts.images / len(parts.images)
        along = (of_direction * unit(weights)).sum(1, keepdims=True) * unit(weights)
        gradient = (of_direction - along) / lengths
        gradient = gradient + 2 * penalties[:, None] * change / len(penalties)
        velocity = 0.9 * velocity + gradient
        weights = weights - rate * velocity
    return 100 * parts.queries @ unit(weights).T, losses


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("start", ["text", pytest.param("centroids", marks=pytest.mark.slow)])
def test_steps_of_zs_lp(model, start, labels):
    episode = with_views(2, labels)
    parts = parts_of(model, episode)
    starts = {"text": parts.texts, "centroids": unit(parts.classes.T @ parts.images)}
    expected, losses = by_hand(parts, starts[start], np.zeros(3), 8)
    result = learn(model, ZSLP(steps=8, start_from=start), episode)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.query_logits, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("labels", LABELS)
def test_steps_of_clap(model, labels):
    episode = with_views(2, labels)
    parts = parts_of(model, episode)
    right = softmax(100 * parts.images @ parts.texts.T) * parts.classes
    penalties = 0.5 * right.sum(0) / parts.classes.sum(0)
    assert penalties.max() > 0.01
    expected, losses = by_hand(parts, parts.texts, penalties, 8)
    result = learn(model, CLAP(steps=8, constraint=0.5), episode)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.query_logits, expected, rtol=1e-3, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ZSLP(steps=0), CLAP(steps=0)])
def test_without_steps_they_are_zero_shot(model, method):
    expected = learn(model, ZeroShot(logit_scale=100), EPISODES[0]).query_logits
    result = learn(model, method, EPISODES[0])
    torch.testing.assert_close(result.query_logits, expected, atol=1e-4, rtol=0)
    assert result.losses == []


@pytest.mark.slow
def test_without_a_penalty_clap_is_zs_lp(model):
    results = [learn(model, each, EPISODES[0]) for each in (CLAP(constraint=0), ZSLP())]
    assert torch.equal(results[0].query_logits, results[1].query_logits)
    assert results[0].losses == results[1].losses


@pytest.mark.slow
def test_a_large_penalty_keeps_clap_at_zero_shot(model):
    episode = with_views(1)
    expected = learn(model, ZeroShot(logit_scale=1), episode).query_logits
    free, held = (
        (learn(model, CLAP(logit_scale=1, constraint=c), episode).query_logits - expected)
        .abs()
        .max()
        for c in (0, 30)
    )
    assert held < free / 20


def test_ranges():
    with pytest.raises(ValueError, match="steps must be at least 0; got -1"):
        ZSLP(steps=-1)
    with pytest.raises(ValueError, match="steps must be at most 1000000, since"):
        CLAP(steps=10**7)
    with pytest.raises(ValueError, match="constraint must be a finite number of at least 0"):
        CLAP(constraint=-1)
    with pytest.raises(ValueError, match="feature_lr must be a finite number of at least 0"):
        ZSLP(feature_lr=float("nan"))
    with pytest.raises(ValueError, match="start_from must be one of text, centroids"):
        ZSLP(start_from="noise")
