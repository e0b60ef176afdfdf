"""CLIP-Adapter against plain steps of SGD on its two layers."""

import numpy as np
import pytest
import torch
from fewshot.frozen_cases import learn, parts_of, stepped, warmed, with_views
from fewshot.training_cases import EPISODES, make_model, make_tokenizer
from torch.nn.functional import normalize

from tir_kernels.fewshot import finetune_episodes
from tir_kernels.fewshot.methods.clip_adapter import CLIPAdapter
from tir_kernels.fewshot.methods.zero_shot import ZeroShot


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_steps(model):
    episode = with_views(3, (0, 0, 0, 0, 1, 2))
    parts = parts_of(model, episode)
    rows, texts = torch.tensor(parts.rows), torch.tensor(parts.texts)
    queries = model.encode_image(episode.query_images).detach().double()
    options = {"adapter_ratio": 0.7, "adapter_reduction": 2, "feature_lr": 0.05}
    start = learn(model, CLIPAdapter(steps=0, **options), episode).trained
    down, up = (start[name].double().requires_grad_() for name in ("down", "up"))
    assert down.shape == (16, 8)

    def logits(features):
        adapted = torch.relu(torch.relu(features @ down) @ up)
        return 100 * normalize(0.7 * adapted + 0.3 * features, dim=1) @ texts.T

    optimizer = torch.optim.SGD([down, up], momentum=0.9, weight_decay=5e-4)
    labels = episode.support_labels
    losses = stepped(lambda: logits(rows), labels, optimizer, warmed(0.05, 6))
    result = learn(model, CLIPAdapter(steps=6, **options), episode)
    np.testing.assert_allclose(result.losses, losses, rtol=2e-3, atol=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        np.testing.assert_allclose(result.query_logits, logits(queries), rtol=5e-3, atol=2e-2)


@pytest.mark.slow
def test_without_a_share_it_is_zero_shot(model):
    expected = learn(model, ZeroShot(logit_scale=100), EPISODES[0]).query_logits
    found = learn(model, CLIPAdapter(adapter_ratio=0, steps=5), EPISODES[0]).query_logits
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_starts_are_the_episodes_own_and_as_wide_as_those_of_a_linear_layer(model):
    results = finetune_episodes(model, make_tokenizer(), EPISODES, CLIPAdapter(steps=0))
    for name, inputs in (("down", 16), ("up", 4)):
        weights = torch.stack([result.trained[name] for result in results])
        assert 0.8 < weights.abs().max() * inputs**0.5 <= 1
        assert len({each.sum().item() for each in weights}) == 3


def test_ranges():
    with pytest.raises(ValueError, match=r"adapter_ratio must lie in \[0, 1\]; got 2"):
        CLIPAdapter(adapter_ratio=2)
    with pytest.raises(ValueError, match="adapter_reduction must be at least 1; got 0"):
        CLIPAdapter(adapter_reduction=0)
