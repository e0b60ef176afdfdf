"""Mind: its losses against NumPy, its schedule, and the settings at which it is plain LoRA."""

import numpy as np
import pytest
import torch
from fewshot.training_cases import EPISODES, draw_episode, make_model, make_tokenizer
from scipy.special import log_softmax

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot import Runtime, finetune_episode, finetune_episodes
from tir_kernels.fewshot.classifier.fitting import require_fitting
from tir_kernels.fewshot.methods.lora import LoRA
from tir_kernels.fewshot.methods.mind import Mind
from tir_kernels.fewshot.settings import FitSettings
from tir_kernels.fewshot.train.batch import Job

SETTINGS = {"steps": 10, "lora_lr": 1e-2, "lora_dropout": 0.25}


@pytest.fixture(scope="module")
def model():
    return make_model()


def with_views():
    """An episode of two classes, two images each, and two views of each image."""
    episode = draw_episode(2, ["a cat", "a dog"], shots=4)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    fields = {"support_labels": labels, "shots": 2}
    return type(episode)(**(vars(episode) | fields))


def cross_entropy(logits, labels):
    return -log_softmax(logits, 1)[np.arange(len(labels)), labels].mean()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_losses_are_those_of_the_equation(model):
    episode = with_views()
    method = Mind(**(SETTINGS | {"lora_dropout": 0.0}))
    job = Job(model, make_tokenizer(), method, 0, Runtime())
    labels = episode.support_labels.numpy()
    with job.learner([episode]) as learner:
        inputs = learner.inputs(episode.support_images[None])
        learner.fit(inputs, episode.support_labels[None])
        with torch.no_grad():
            f = unit(learner.features(inputs)[0].double().numpy())
            t = unit(learner.classes()[0].double().numpy())
        before = np.zeros((8, 4))
        for step in range(10):
            # Nothing is stepped, but what is carried changes.
            found = learner.training_losses(inputs, episode.support_labels[None]).item()
            w = 1 - step / 6
            expected = cross_entropy(100 * f @ t.T, labels)
            x = f @ f[::2].T
            if w > 0:
                r = f[learner._drawn[step, 0].numpy()]
                g = w * before + (1 - w) * (t @ t.T)[labels][:, labels[::2]]
                expected += 0.1 * cross_entropy(100 * f @ r.T, labels)
                expected += 3 * (step > 0) * (np.exp(g) * (g - x)).mean()
            before = x
            learner.next_step()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-4), step


def test_without_its_weights_it_is_lora_on_the_vision_tower(model):
    plain = {"context_tokens": 0, "logit_scale": 100.0, "lora_towers": "vision"}
    expected = finetune_episode(
        model, make_tokenizer(), EPISODES[0], LoRA(lora_schedule="cosine/8", **plain, **SETTINGS)
    )
    mind = Mind(visual_weight=0, alignment_weight=0, **SETTINGS)
    found = finetune_episode(model, make_tokenizer(), EPISODES[0], mind)
    assert found.losses == expected.losses
    assert torch.equal(found.query_logits, expected.query_logits)


@pytest.mark.slow
def test_its_losses_matter(model):
    found = [
        finetune_episode(model, make_tokenizer(), EPISODES[0], Mind(**SETTINGS, **weights)).losses
        for weights in ({}, {"visual_weight": 0}, {"alignment_weight": 0})
    ]
    assert len({losses[-1] for losses in found}) == 3


@pytest.mark.slow
def test_at_once_is_alone(model):
    episodes = [draw_episode(index, ["a cat", "a dog", "a cow"]) for index in range(2)]
    method = Mind(**SETTINGS)
    for episode, found in zip(
        episodes, finetune_episodes(model, make_tokenizer(), episodes, method), strict=True
    ):
        alone = finetune_episode(model, make_tokenizer(), episode, method)
        torch.testing.assert_close(found.query_logits, alone.query_logits, atol=2e-2, rtol=1e-3)


def test_it_takes_no_batches():
    with pytest.raises(FewShotError, match="mind compares all images"):
        require_fitting(Mind(), FitSettings(batch_size=4))
