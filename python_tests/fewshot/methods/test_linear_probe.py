"""The linear probe is scikit-learn's, on each episode's frozen features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fewshot.training_cases import EPISODES, draw_episode, make_model, make_tokenizer
from sklearn.linear_model import LogisticRegression
from sklearn.utils.class_weight import compute_class_weight

from tir_kernels.fewshot import Runtime, finetune_episodes
from tir_kernels.fewshot.classifier.fitting import balanced_weights
from tir_kernels.fewshot.methods import method_class
from tir_kernels.fewshot.train.batch import Job, finetune_batch


@pytest.mark.parametrize("penalty", [0.316, 100.0])
@pytest.mark.parametrize("ways", [2, 3])
@torch.no_grad()
def test_equal_to_scikit_learn(penalty: float, ways: int) -> None:
    model = make_model()
    episodes = EPISODES[:2] if ways == 3 else [draw_episode(i, ["a", "b"], 3) for i in (1, 2)]
    method = method_class("linear-probe")(inverse_penalty=penalty)
    results = finetune_episodes(model, make_tokenizer(), episodes, method)
    for episode, result in zip(episodes, results, strict=True):
        support, query = (
            F.normalize(model.encode_image(images), dim=-1).double().numpy()
            for images in (episode.support_images, episode.query_images)
        )
        probe = LogisticRegression(C=penalty, max_iter=1000)
        probe.fit(support, episode.support_labels.numpy())
        expected = torch.from_numpy(probe.predict_proba(query)).float()
        torch.testing.assert_close(result.query_logits.softmax(1), expected, atol=2e-3, rtol=0)
        score = probe.score(support, episode.support_labels.numpy())
        assert result.support_accuracy == pytest.approx(score)
        assert result.losses == []


@pytest.mark.parametrize("labels", [[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 2]])
@torch.no_grad()
def test_balanced_as_in_scikit_learn(labels: list[int]) -> None:
    model, ways = make_model(), max(labels) + 1
    drawn = draw_episode(1, ["a", "b"], 3)
    names = ["a", "b", "c"][:ways]
    episode = replace(drawn, class_names=names, support_labels=torch.tensor(labels))
    features = F.normalize(model.encode_image(episode.support_images), dim=-1).double().numpy()
    query = F.normalize(model.encode_image(episode.query_images), dim=-1).double().numpy()

    def found(weights: torch.Tensor | None) -> torch.Tensor:
        method = method_class("linear-probe")()
        job = Job(model, make_tokenizer(), method, 0, Runtime(), class_weights=weights)
        return finetune_batch(job, [episode], None)[0].query_logits.softmax(1)

    def expected(class_weight: str | None) -> torch.Tensor:
        probe = LogisticRegression(C=100.0, max_iter=1000, class_weight=class_weight)
        return torch.from_numpy(probe.fit(features, labels).predict_proba(query)).float()

    weights = balanced_weights(episode.support_labels, ways)
    torch.testing.assert_close(found(weights), expected("balanced"), atol=2e-3, rtol=0)
    torch.testing.assert_close(found(None), expected(None), atol=2e-3, rtol=0)
    assert (expected("balanced") - expected(None)).abs().max() > 1e-2


def test_weights_are_those_of_scikit_learn() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert balanced_weights(labels, 3).tolist() == pytest.approx(expected.tolist())
