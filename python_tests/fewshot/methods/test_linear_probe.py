"""The linear probe is scikit-learn's, on each episode's frozen features."""

import pytest
import torch
import torch.nn.functional as F
from fewshot.training_cases import EPISODES, draw_episode, make_model, make_tokenizer
from sklearn.linear_model import LogisticRegression

from tir_kernels.fewshot import finetune_episodes
from tir_kernels.fewshot.methods import method_class


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
