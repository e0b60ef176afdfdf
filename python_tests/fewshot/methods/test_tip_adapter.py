"""Tip-Adapter: its equation against NumPy, and the settings at which it changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fewshot.training_cases import EPISODES, NAMES, draw_episode, make_model, make_tokenizer

from tir_kernels.fewshot import finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods.tip_adapter import TipAdapter
from tir_kernels.fewshot.methods.zero_shot import ZeroShot


@pytest.fixture(scope="module")
def model():
    return make_model()


def learn(model, method, episode):
    return finetune_episode(model, make_tokenizer(), episode, method).query_logits.numpy()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def with_views(episode, views):
    """The episode with more views of each support image, which follow it."""
    generator = torch.Generator().manual_seed(1)
    images = episode.support_images.repeat_interleave(views, 0)
    noise = 0.5 * torch.randn(images.shape, generator=generator)
    noise[::views] = 0
    labels = episode.support_labels.repeat_interleave(views)
    return replace(episode, support_images=images + noise, support_labels=labels, shots=2)


@pytest.mark.parametrize("views", [1, 3])
def test_equation(model, views):
    episode = with_views(draw_episode(3, NAMES[1]), views)
    prompts = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
    with torch.no_grad():
        text, support, query = (
            each.double().numpy()
            for each in (
                model.encode_text(prompts),
                model.encode_image(episode.support_images),
                model.encode_image(episode.query_images),
            )
        )
    keys = unit(support.reshape(-1, views, support.shape[1]).mean(1))
    values = np.eye(3)[episode.support_labels[::views]]
    cache = np.exp(-2.0 * (1 - unit(query) @ keys.T)) @ values
    expected = 100 * unit(query) @ unit(text).T + 1.5 * cache
    found = learn(model, TipAdapter(alpha=1.5, beta=2.0), episode)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-2)  # words in float16


def test_without_weight_it_is_zero_shot(model):
    expected = learn(model, ZeroShot(logit_scale=100), EPISODES[0])
    assert np.array_equal(learn(model, TipAdapter(alpha=0), EPISODES[0]), expected)


def test_without_sharpness_each_class_gets_the_same(model):
    expected = learn(model, ZeroShot(logit_scale=100), EPISODES[0])
    found = learn(model, TipAdapter(alpha=1, beta=0), EPISODES[0])
    np.testing.assert_allclose(found - expected, 2.0, atol=1e-4)  # two shots


def test_a_sharp_cache_knows_its_own_images(model):
    method = TipAdapter(alpha=1e6, beta=1e4)
    result = finetune_episode(model, make_tokenizer(), EPISODES[1], method)
    assert result.support_accuracy == 1


def test_at_once_is_as_alone(model):
    together = finetune_episodes(model, make_tokenizer(), EPISODES, TipAdapter(beta=1))
    for episode, result in zip(EPISODES, together, strict=True):
        alone = learn(model, TipAdapter(beta=1), episode)
        np.testing.assert_allclose(result.query_logits, alone, atol=1e-4)
        assert result.losses == []
        assert result.trained["keys"].shape == (6, 16)
