"""Tip-Adapter-F against plain steps of AdamW on the keys."""

import numpy as np
import pytest
import torch
from fewshot.frozen_cases import falling, learn, parts_of, stepped, unit, with_views
from fewshot.training_cases import EPISODES, make_model

from tir_kernels.fewshot.methods.tip_adapter import TipAdapter
from tir_kernels.fewshot.methods.tip_adapter_f import TipAdapterF


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_steps(model):
    episode = with_views(3, (0, 0, 0, 0, 1, 2))
    parts = parts_of(model, episode)
    keys = torch.tensor(parts.images, requires_grad=True)
    rows, queries, texts, values = map(
        torch.tensor, (unit(parts.rows), parts.queries, parts.texts, parts.classes)
    )

    def logits(features):
        cache = torch.exp(-5.5 * (1 - features @ keys.T)) @ values
        return 100 * features @ texts.T + 20 * cache

    optimizer = torch.optim.AdamW([keys], eps=1e-4, weight_decay=0.01)
    labels = episode.support_labels
    losses = stepped(lambda: logits(rows), labels, optimizer, falling(0.02, 6))
    result = learn(model, TipAdapterF(steps=6, alpha=20, feature_lr=0.02), episode)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3, atol=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        np.testing.assert_allclose(result.query_logits, logits(queries), rtol=1e-3, atol=5e-3)


def test_without_steps_it_is_tip_adapter(model):
    results = [learn(model, m, EPISODES[0]) for m in (TipAdapterF(steps=0), TipAdapter())]
    assert torch.equal(results[0].query_logits, results[1].query_logits)
