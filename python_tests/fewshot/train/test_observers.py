"""Observers see a training between its steps, and change no bit of it."""

import math
from dataclasses import replace

import pytest
import torch
from fewshot.training_cases import EPISODES, METHOD, as_method, make_model, make_tokenizer

from tir_kernels.fewshot import NonFiniteLossError, finetune_episodes
from tir_kernels.fewshot.methods import Observer


class Watcher(Observer):
    """Notes what it sees, and draws random numbers, which training must not notice."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.steps: list[int] = []
        self.losses: list[list[float]] = []
        self.episodes: list[int] = []

    def start(self, episodes) -> None:
        assert not self.steps
        self.episodes = [episode.index for episode in episodes]

    def observe(self, step, learner, inputs) -> None:
        torch.rand(3)
        assert not torch.is_grad_enabled()
        self.steps.append(step)
        logits = learner.logits(inputs, learner.classes())
        again = learner.logits(inputs, learner.classes())
        assert torch.equal(logits, again), "dropout is off"
        labels = torch.stack([each.support_labels for each in EPISODES[:2]])
        self.losses.append(learner.loss(logits, labels).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tir", "lora"])
def test_observed_is_as_unobserved(name: str) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    method = as_method(name, steps=7, lora_dropout=0.25)
    plain = finetune_episodes(model, tokenizer, EPISODES[:2], method)
    often, seldom = Watcher(1), Watcher(3)
    watched = finetune_episodes(model, tokenizer, EPISODES[:2], method, observers=[often, seldom])
    for one, other in zip(plain, watched, strict=True):
        assert one.losses == other.losses
        assert torch.equal(one.query_logits, other.query_logits)
        assert all(torch.equal(one.trained[k], other.trained[k]) for k in one.trained)
    assert often.episodes == [episode.index for episode in EPISODES[:2]]
    assert often.steps == list(range(8))
    assert seldom.steps == [0, 3, 6, 7]
    assert [often.losses[step] for step in seldom.steps] == seldom.losses


def test_without_dropout_it_sees_the_losses_of_the_steps() -> None:
    watcher = Watcher(1)
    results = finetune_episodes(
        make_model(),
        make_tokenizer(),
        EPISODES[:2],
        replace(METHOD, steps=4),
        observers=[watcher],
    )
    seen = torch.tensor(watcher.losses[:-1]).T
    torch.testing.assert_close(seen, torch.tensor([each.losses for each in results]))


def test_a_method_without_steps_is_seen_once() -> None:
    watcher = Watcher(5)
    finetune_episodes(
        make_model(), make_tokenizer(), EPISODES[:2], as_method("zero-shot"), observers=[watcher]
    )
    assert watcher.steps == [0]


def test_a_training_that_fails_is_seen_at_the_step_it_reached() -> None:
    class Counter(Observer):
        every = 100
        steps: list[int] = []  # noqa: RUF012

        def observe(self, step, learner, inputs) -> None:
            self.steps.append(step)

    broken = replace(EPISODES[0], support_images=EPISODES[0].support_images * math.nan)
    counter = Counter()
    (result,) = finetune_episodes(
        make_model(), make_tokenizer(), [broken], METHOD, observers=[counter]
    )
    assert isinstance(result, NonFiniteLossError)
    assert counter.steps == [0, 1]
