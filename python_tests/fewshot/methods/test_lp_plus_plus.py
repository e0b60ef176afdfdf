"""LP++ against NumPy: starts, step sizes, and α's step every tenth time by that step's gradient."""

import numpy as np
import pytest
from fewshot.frozen_cases import learn, parts_of, softmax, with_views
from fewshot.training_cases import make_model

from tir_kernels.fewshot.methods.lp_plus_plus import LPPlusPlus

STEPS = [*(pytest.param(steps, marks=pytest.mark.slow) for steps in (0, 9, 10)), 21]
LABELS = [pytest.param((0, 0, 1, 1, 2, 2), marks=pytest.mark.slow), (0, 0, 0, 0, 1, 2)]


@pytest.fixture(scope="module")
def model():
    return make_model()


def by_hand(parts, steps):
    count, cosines = len(parts.images), parts.images @ parts.texts.T
    rate = 4 * count / np.linalg.eigvalsh(parts.images.T @ parts.images)[-1]
    alpha_rate = count / (4 * (cosines**2).sum(0).max())
    of_class = (parts.classes * cosines).sum(0) / parts.classes.sum(0)
    weights, bias = parts.classes.T @ parts.images, np.zeros(3)
    alpha = np.full(3, 250 * of_class.mean())
    velocity, bias_velocity, losses = 0, 0, []
    for step in range(1, steps + 1):
        found = softmax(parts.images @ weights.T + bias + alpha * cosines)
        losses.append(-np.log((found * parts.classes).sum(1)).mean())
        error = (found - parts.classes) / count
        if step % 10 == 0:
            alpha = alpha - alpha_rate * (error * cosines).sum(0)
        velocity = 0.9 * velocity + error.T @ parts.images
        bias_velocity = 0.9 * bias_velocity + error.sum(0)
        weights, bias = weights - rate * velocity, bias - rate * bias_velocity
    logits = parts.queries @ weights.T + bias + alpha * (parts.queries @ parts.texts.T)
    return logits, losses, {"weights": weights, "bias": bias, "alpha": alpha}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("steps", STEPS)
def test_steps(model, labels, steps):
    episode = with_views(2, labels)
    logits, losses, trained = by_hand(parts_of(model, episode), steps)
    result = learn(model, LPPlusPlus(steps=steps), episode)
    np.testing.assert_allclose(result.losses, losses, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(result.query_logits, logits, rtol=2e-3, atol=5e-3)
    assert result.trained.keys() == trained.keys()
    for name, values in trained.items():
        np.testing.assert_allclose(result.trained[name], values, rtol=2e-3, atol=5e-3)


@pytest.mark.slow
def test_alpha_moves_every_tenth_step(model):
    episode = with_views(1)
    alphas = [learn(model, LPPlusPlus(steps=n), episode).trained["alpha"] for n in (0, 9, 10, 19)]
    assert alphas[0].equal(alphas[1])
    assert not alphas[1].equal(alphas[2])
    assert alphas[2].equal(alphas[3])
