"""LoRA with noise in training: temperature dropout and random registers."""

from dataclasses import replace

import pytest
import torch
from fewshot.method_cases import (
    assert_stopped_is_as_never_stopped,
)
from fewshot.training_cases import (
    EPISODES,
    as_method,
    assert_each_as_alone,
    make_model,
    make_tokenizer,
    steady_model,
)

from tir_kernels.fewshot import finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods.random_registers import RandomRegisters
from tir_kernels.fewshot.methods.temperature_dropout import TemperatureDropout

NEUTRAL = {"temperature-dropout": "temperature_dropout", "random-registers": "random_registers"}
NAMES = sorted(NEUTRAL)


def learn(method):
    return finetune_episode(make_model(), make_tokenizer(), EPISODES[0], method)


@pytest.mark.parametrize("name", NAMES)
def test_the_neutral_setting_is_lora(name):
    lora = as_method("lora", steps=2, lora_dropout=0.25)
    method = as_method(name, steps=2, lora_dropout=0.25, **_own(name, 0))
    expected, found = learn(lora), learn(method)
    assert torch.equal(found.query_logits, expected.query_logits)
    assert found.losses == expected.losses
    assert found.trained.keys() == expected.trained.keys()
    for part, value in expected.trained.items():
        assert torch.equal(found.trained[part], value), part


def _own(name, value):
    others = {"register_scale": 0.5, "register_lr": 1e-2} if name == "random-registers" else {}
    return {NEUTRAL[name]: value, **others}


def method_of(name, steps):
    value = 0.5 if name == "temperature-dropout" else 3
    return as_method(name, steps=steps, lora_dropout=0.25, **_own(name, value))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_at_once_is_as_alone(name):
    method = method_of(name, 6)
    model = steady_model(method)
    together = finetune_episodes(model, make_tokenizer(), EPISODES, method)
    assert_each_as_alone(model, EPISODES, method, together)
    plain = finetune_episodes(
        model, make_tokenizer(), EPISODES, as_method("lora", steps=6, lora_dropout=0.25)
    )
    for one, other in zip(together, plain, strict=True):
        assert not torch.allclose(one.query_logits, other.query_logits, atol=1e-2)
        if name == "random-registers":
            assert one.trained["register_scale"] != 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopped_is_as_never_stopped(name, precision):
    assert_stopped_is_as_never_stopped(method_of(name, 5), precision, 2, 4)


def test_what_is_refused():
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"temperature_dropout must lie in \[0, 1\)"):
            TemperatureDropout(temperature_dropout=value)
    with pytest.raises(ValueError, match="random_registers must be at least 0"):
        RandomRegisters(random_registers=-1)
    with pytest.raises(ValueError, match="register_scale must be a finite number of at least 0"):
        replace(RandomRegisters(), register_scale=-1)
