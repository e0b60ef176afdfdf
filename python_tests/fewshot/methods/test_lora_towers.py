"""LoRA on one tower: the other one's bits, what is trained, and classifiers made of it."""

import copy

import pytest
import torch
from fewshot.training_cases import EPISODES, draw_episode, make_model, make_tokenizer

from tir_kernels import adapters
from tir_kernels.fewshot import Runtime, finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods.lora import LoRA
from tir_kernels.fewshot.methods.tir import TIR
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.train.batch import Job

SETTINGS = {"steps": 4, "lora_lr": 1e-2, "lora_dropout": 0.0, "logit_scale": 100.0}


@pytest.fixture(scope="module")
def model():
    return make_model()


def learn(model, method, episode=EPISODES[0]):
    return finetune_episode(model, make_tokenizer(), episode, method)


@pytest.mark.parametrize(("towers", "place"), [("vision", "visual"), ("text", "text")])
def test_the_other_tower_is_not_trained(model, towers, place):
    trained = learn(model, LoRA(lora_towers=towers, context_tokens=0, **SETTINGS)).trained
    assert {name.split(".")[1] for name in trained if name.startswith("lora.")} == {place}


def by_hand(model, episode, towers, schedule=None):
    """The losses of plain steps on a copy of the model with LoRA on some towers."""
    model = copy.deepcopy(model).requires_grad_(False)
    start = LoRA(lora_towers={"visual": "vision"}.get(towers, towers), **SETTINGS)
    with Job(model, make_tokenizer(), start, 0, Runtime()).learner([episode]) as learner:
        factors = {n: a[0].clone() for n, (a, _) in learner.lora.factors().items()}
    with adapters.add_lora(
        model, dropout=0.0, towers=(towers,), passes_input_gradient=False
    ) as lora:
        lora.set_factors(factors)
        optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-2, weight_decay=0.01)
        scheduler = None if schedule is None else schedule(optimizer)
        prompts = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
        losses = []
        for _ in range(4):
            images = model.encode_image(episode.support_images, normalize=True)
            logits = 100 * images @ model.encode_text(prompts, normalize=True).T
            loss = torch.nn.functional.cross_entropy(logits, episode.support_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("towers", "place"), [("vision", "visual"), ("text", "text")])
def test_steps_are_those_of_plain_lora(model, towers, place):
    method = LoRA(lora_towers=towers, context_tokens=0, **SETTINGS)
    found = learn(model, method, EPISODES[1]).losses
    # The program keeps the prompts' words in float16.
    torch.testing.assert_close(found, by_hand(model, EPISODES[1], place), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("name", "periods"), [("cosine", 1), ("cosine/8", 8)])
def test_schedule_is_pytorchs(model, name, periods):
    method = LoRA(lora_towers="vision", context_tokens=0, lora_schedule=name, **SETTINGS)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    expected = by_hand(model, EPISODES[1], "visual", lambda o: cosine(o, T_max=4 * periods))
    found = learn(model, method, EPISODES[1]).losses
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_without_change_it_is_zero_shot(model):
    expected = learn(model, ZeroShot(logit_scale=100.0)).query_logits
    for towers in ("vision", "text"):
        method = LoRA(lora_towers=towers, context_tokens=0, **(SETTINGS | {"lora_lr": 0.0}))
        torch.testing.assert_close(learn(model, method).query_logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("towers", ["vision", "text"])
@pytest.mark.parametrize("kind", [LoRA, TIR])
def test_at_once_is_alone(model, towers, kind):
    episodes = [draw_episode(index, ["a cat", "a dog", "a cow"]) for index in range(2)]
    method = kind(lora_towers=towers, context_tokens=0, **SETTINGS)
    together = finetune_episodes(model, make_tokenizer(), episodes, method)
    for episode, found in zip(episodes, together, strict=True):
        alone = learn(model, method, episode)
        torch.testing.assert_close(found.query_logits, alone.query_logits, atol=2e-3, rtol=1e-3)


def test_texts_of_tir_with_lora_on_images_stay(model):
    # Relevance is to texts that nothing trains: with weights of strength 0, LoRA's own losses.
    plain = LoRA(lora_towers="vision", context_tokens=0, **SETTINGS)
    weightless = TIR(lora_towers="vision", context_tokens=0, strength=0.0, **SETTINGS)
    expected = learn(model, plain).losses
    torch.testing.assert_close(learn(model, weightless).losses, expected, rtol=1e-4, atol=1e-4)
