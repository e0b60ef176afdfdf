"""Centroids against NumPy, with views, centred, blended with texts, and of unequal classes."""

import numpy as np
import pytest
import timm
import torch
from fewshot.frozen_cases import learn, parts_of, unit, with_views
from fewshot.training_cases import EPISODES, draw_episode, make_model

from tir_kernels.fewshot import finetune_episode
from tir_kernels.fewshot.methods.centroid import Centroid

LABELS = [pytest.param((0, 0, 1, 1, 2, 2), marks=pytest.mark.slow), (0, 0, 0, 0, 1, 2)]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("views", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_equation(model, views, labels):
    episode = with_views(views, labels)
    parts = parts_of(model, episode)
    means = parts.classes.T @ parts.images / parts.classes.sum(0)[:, None]
    plain = 10 * parts.queries @ unit(means).T
    found = learn(model, Centroid(), episode).query_logits
    np.testing.assert_allclose(found, plain, atol=2e-5)

    origin = means.mean(0)
    centred = parts.classes.T @ unit(parts.images - origin)
    expected = 10 * unit(parts.queries - origin) @ unit(centred).T
    found = learn(model, Centroid(centre="support"), episode).query_logits
    np.testing.assert_allclose(found, expected, atol=5e-4)

    expected = 3 * parts.queries @ unit(0.75 * unit(means) + 0.25 * parts.texts).T
    found = learn(model, Centroid(text_weight=0.25, logit_scale=3), episode).query_logits
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
def test_one_shot_is_the_nearest_neighbour(model):
    episode = draw_episode(5, ["a", "b", "c"], 1, 9)
    parts = parts_of(model, episode)
    nearest = (parts.queries @ parts.images.T).argmax(1)
    assert np.array_equal(learn(model, Centroid(), episode).query_logits.argmax(1), nearest)


@pytest.mark.slow
def test_texts_alone_are_zero_shot(model):
    parts = parts_of(model, EPISODES[0])
    found = learn(model, Centroid(text_weight=1), EPISODES[0]).query_logits
    np.testing.assert_allclose(found, 10 * parts.queries @ parts.texts.T, atol=2e-5)


@pytest.mark.slow
def test_without_texts_the_model_needs_none():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    for method in (Centroid(), Centroid(centre="support")):
        result = finetune_episode(model, None, EPISODES[0], method)
        assert result.support_accuracy == 1
    with pytest.raises(TypeError, match="this needs texts"):
        finetune_episode(model, None, EPISODES[0], Centroid(text_weight=0.5))


def test_ranges():
    with pytest.raises(ValueError, match=r"text_weight must lie in \[0, 1\]; got 1.5"):
        Centroid(text_weight=1.5)
    with pytest.raises(ValueError, match="text_weight must be a finite number of at least 0"):
        Centroid(text_weight=-0.1)
    with pytest.raises(ValueError, match="text_weight must be 0 with centre='support'"):
        Centroid(text_weight=0.5, centre="support")
    with pytest.raises(ValueError, match="centre must be one of none, support"):
        Centroid(centre="query")
