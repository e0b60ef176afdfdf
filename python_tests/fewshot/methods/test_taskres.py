"""TaskRes against plain steps of Adam on the residuals."""

import numpy as np
import pytest
import torch
from fewshot.frozen_cases import learn, parts_of, stepped, warmed, with_views
from fewshot.training_cases import EPISODES, make_model
from torch.nn.functional import normalize

from tir_kernels.fewshot.methods.taskres import TaskRes
from tir_kernels.fewshot.methods.zero_shot import ZeroShot


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_steps(model):
    episode = with_views(2, (0, 0, 0, 0, 1, 2))
    parts = parts_of(model, episode)
    images, queries, texts = map(torch.tensor, (parts.images, parts.queries, parts.texts))
    residuals = torch.zeros_like(texts, requires_grad=True)

    def logits(features):
        return 100 * features @ normalize(10 * texts + 0.3 * residuals, dim=1).T

    optimizer = torch.optim.Adam([residuals], weight_decay=5e-4)
    labels = episode.support_labels[::2]
    losses = stepped(lambda: logits(images), labels, optimizer, warmed(0.05, 6))
    result = learn(model, TaskRes(steps=6, residual_scale=0.3, feature_lr=0.05), episode)
    np.testing.assert_allclose(result.losses, losses, rtol=2e-3, atol=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        np.testing.assert_allclose(result.query_logits, logits(queries), rtol=2e-3, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("method", [TaskRes(steps=0), TaskRes(residual_scale=0)])
def test_without_steps_or_scale_it_is_zero_shot(model, method):
    expected = learn(model, ZeroShot(logit_scale=100), EPISODES[0]).query_logits
    found = learn(model, method, EPISODES[0]).query_logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
