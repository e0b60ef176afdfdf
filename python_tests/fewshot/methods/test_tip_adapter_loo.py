"""Tip-Adapter's leave-one-out search against every image left out by itself in NumPy."""

from dataclasses import replace

import numpy as np
import pytest
from fewshot.frozen_cases import learn, parts_of, softmax, with_views
from fewshot.training_cases import draw_episode, make_model

from tir_kernels.fewshot.methods import tip_adapter_loo
from tir_kernels.fewshot.methods.tip_adapter_loo import ALPHAS, BETAS, TEXT_WEIGHTS, TipAdapterLOO


@pytest.fixture(scope="module")
def model():
    return make_model()


def logits_of(features, keys, classes, texts, numbers):
    alpha, beta, text_weight = numbers
    near = np.exp(-beta * (1 - features @ keys.T))
    return text_weight * 100 * features @ texts.T + alpha * near @ classes / classes.sum(0)


def left_out_loss(parts, numbers):
    losses = []
    for row in range(len(parts.images)):
        kept = np.arange(len(parts.images)) != row
        found = logits_of(
            parts.images[row], parts.images[kept], parts.classes[kept], parts.texts, numbers
        )
        losses.append(-np.log(softmax(found) @ parts.classes[row]))
    return np.mean(losses)


@pytest.mark.parametrize(
    "labels", [pytest.param((0, 0, 1, 1, 2, 2), marks=pytest.mark.slow), (0, 0, 0, 1, 1, 1)]
)
@pytest.mark.parametrize("at_once", [256, pytest.param(4, marks=pytest.mark.slow)])
def test_the_least_loss_of_the_grid(model, labels, at_once, monkeypatch):
    monkeypatch.setattr(tip_adapter_loo, "_AT_ONCE", at_once)
    monkeypatch.setattr(tip_adapter_loo, "ALPHAS", ALPHAS[::3])
    monkeypatch.setattr(tip_adapter_loo, "BETAS", BETAS[1::3])
    monkeypatch.setattr(tip_adapter_loo, "TEXT_WEIGHTS", TEXT_WEIGHTS[::3])
    episode = with_views(2, labels)
    if max(labels) == 1:
        episode = replace(episode, class_names=episode.class_names[:2])
    parts = parts_of(model, episode)
    grid = [
        (alpha, beta, text_weight)
        for alpha in ALPHAS[::3]
        for beta in BETAS[1::3]
        for text_weight in TEXT_WEIGHTS[::3]
    ]
    losses = [left_out_loss(parts, numbers) for numbers in grid]
    result = learn(model, TipAdapterLOO(), episode)
    chosen = [result.trained[name].item() for name in ("alpha", "beta", "text_weight")]
    place = np.argmin(np.abs(np.array(grid) - chosen).sum(1))
    np.testing.assert_allclose(chosen, grid[place], rtol=1e-6)
    assert losses[place] <= min(losses) + 1e-5
    expected = logits_of(parts.queries, parts.images, parts.classes, parts.texts, grid[place])
    np.testing.assert_allclose(result.query_logits, expected, rtol=1e-4, atol=1e-4)


def test_one_image_of_a_class_is_refused(model):
    with pytest.raises(ValueError, match="at least 2 of each class; take tip-adapter with fixed"):
        learn(model, TipAdapterLOO(), draw_episode(0, ["a", "b"], 1))
    with pytest.raises(ValueError, match="tip-adapter-loo leaves out one support image"):
        learn(model, TipAdapterLOO(), with_views(1, (0, 0, 0, 1, 1, 2)))
