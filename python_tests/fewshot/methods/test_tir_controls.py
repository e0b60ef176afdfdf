"""Options of the published method for ablations: centroids, and other choices of tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fewshot.training_cases import (
    EPISODES,
    METHOD,
    assert_each_as_alone,
    assert_same,
    make_model,
    make_tokenizer,
    steady_model,
)

from tir_kernels.adapters import reweighting_of
from tir_kernels.fewshot import Runtime, finetune_episode, finetune_episodes
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.methods import Observer
from tir_kernels.fewshot.methods.frozen_images import centroids

CONTROLS = [
    {"relevance": "centroids"},
    {"selection": "attention"},
    {"selection": "random"},
    {"selection": "random", "relevance": "centroids", "placement": "attention"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", CONTROLS, ids=str)
def test_at_once_is_as_alone_and_repeats(options) -> None:
    method = replace(METHOD, lora_dropout=0.25, steps=6, **options)
    model = steady_model(method)
    together = finetune_episodes(model, make_tokenizer(), EPISODES, method)
    assert_each_as_alone(model, EPISODES, method, together)
    again = finetune_episodes(model, make_tokenizer(), EPISODES, method)
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one.query_logits, other.query_logits)
    runtime = Runtime(checkpoint=True)
    (kept,) = finetune_episodes(model, make_tokenizer(), EPISODES[:1], method, runtime=runtime)
    assert_same(kept, finetune_episode(model, make_tokenizer(), EPISODES[0], method))


@pytest.mark.parametrize("options", CONTROLS, ids=str)
def test_the_neutral_setting_changes_nothing(options) -> None:
    model = make_model()
    for neutral in ({"strength": 0.0}, {"rule": "none"}):
        method = replace(METHOD, steps=3, **neutral)
        plain = finetune_episode(model, make_tokenizer(), EPISODES[0], method)
        control = replace(method, **options)
        found = finetune_episode(model, make_tokenizer(), EPISODES[0], control)
        trained = {name: each for name, each in found.trained.items() if name != "centroids"}
        assert_same(replace(found, trained=trained), plain)


class Embeddings(Observer):
    """The class embeddings that decide, at each reading."""

    every = 2

    def __init__(self, model) -> None:
        self._model = model
        self.seen: list[torch.Tensor] = []

    def observe(self, step, learner, inputs) -> None:
        learner.show_classes(learner.classes())
        self.seen.append(reweighting_of(self._model).class_embeddings.clone())


@torch.no_grad()
def test_centroids_are_the_mean_directions_of_the_frozen_features() -> None:
    model = make_model()
    watcher = Embeddings(model)
    method = replace(METHOD, steps=3, relevance="centroids")
    finetune_episodes(model, make_tokenizer(), EPISODES[:2], method, observers=[watcher])
    for position, episode in enumerate(EPISODES[:2]):
        features = F.normalize(model.encode_image(episode.support_images), dim=-1)
        means = [features[episode.support_labels == label].mean(0) for label in range(3)]
        expected = F.normalize(torch.stack(means), dim=-1)
        for seen in watcher.seen:
            torch.testing.assert_close(seen[position], expected, atol=1e-5, rtol=0)
    assert len(watcher.seen) == 3


def test_centroids_by_hand() -> None:
    features = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]]])
    found = centroids(features, torch.tensor([[0, 0, 1]]), 2)
    torch.testing.assert_close(found, torch.tensor([[[0.5**0.5, 0.5**0.5], [0.0, -1.0]]]))


def test_memory_is_measured_with_centroids_too() -> None:
    method = replace(METHOD, steps=1, relevance="centroids")
    runtime = Runtime(parallel="auto")
    results = finetune_episodes(
        make_model(), make_tokenizer(), EPISODES[:2], method, runtime=runtime
    )
    assert len(results) == 2


def test_settings_of_runs_from_before_stay_as_they_are() -> None:
    assert not {"relevance", "selection"} & as_settings(METHOD).keys()
    control = as_settings(replace(METHOD, relevance="centroids"))
    assert control["relevance"] == "centroids"
    assert "selection" not in control
