"""What holds for every method on frozen features: at once as alone, stopped as never stopped, and
a classifier that answers as before when it is read again.
"""

from dataclasses import fields

import pytest
import torch
from fewshot.frozen_cases import learn, with_views
from fewshot.train.test_resume import Keeper, StopError
from fewshot.training_cases import EPISODES, make_model, make_tokenizer

from tir_kernels.fewshot import Runtime, finetune_episodes
from tir_kernels.fewshot.methods import method_class
from tir_kernels.fewshot.train.batch import Job, finetune_batch

pytestmark = pytest.mark.slow

STEPPED = ["zs-lp", "clap", "lp++", "taskres", "tip-adapter-f", "clip-adapter", "prolip"]
CLOSED = ["centroid", "tip-adapter-loo"]
# Where the default changes too little in a few steps to be seen.
RATES = {"taskres": 0.05, "tip-adapter-f": 0.05, "clip-adapter": 0.05, "prolip": 1e-3}


def short(name, steps=6):
    chosen = method_class(name)
    options = {"steps": steps} if name in STEPPED else {}
    options |= {"feature_lr": RATES[name]} if name in RATES else {}
    if "alpha" in {field.name for field in fields(chosen)}:
        options["alpha"] = 20.0
    return chosen(**options)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("name", STEPPED + CLOSED)
def test_at_once_is_as_alone(model, name):
    episodes = [with_views(2), *EPISODES]
    method = short(name, 12)
    results = finetune_episodes(model, make_tokenizer(), episodes, method)
    for episode, result in zip(episodes, results, strict=True):
        alone = learn(model, method, episode)
        torch.testing.assert_close(result.losses, alone.losses, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(result.query_logits, alone.query_logits, atol=1e-4, rtol=1e-4)
        assert result.support_accuracy == alone.support_accuracy
        for part, value in result.trained.items():
            # Adam divides by the size of a gradient: where that is near 0, rounding decides. The
            # large steps of LP++ let a rounding grow.
            change = (value - alone.trained[part]).abs().mean()
            assert change <= 1e-4 * max(1, value.abs().max()), part


def train(model, method, keeper=None, precision="float32", **more):
    job = Job(
        model, make_tokenizer(), method, 0, Runtime(precision=precision), saved=keeper, **more
    )
    (result,) = finetune_batch(job, [with_views(2)], None)
    return result


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("name", STEPPED)
def test_stopped_is_as_never_stopped(model, name, batch_size, precision):
    method = short(name, 12)
    expected = train(model, method, precision=precision, batch_size=batch_size)
    assert len(expected.losses) == 12
    keeper = Keeper([3, 11])
    for _ in range(2):
        with pytest.raises(StopError):
            train(model, method, keeper, precision, batch_size=batch_size)
    result = train(model, method, keeper, precision, batch_size=batch_size)
    assert keeper.steps[:1] + keeper.steps[-1:] == [1, 12]
    assert result.losses == expected.losses
    assert torch.equal(result.query_logits, expected.query_logits)
    for part, value in expected.trained.items():
        assert torch.equal(result.trained[part], value), part


@pytest.mark.parametrize("name", STEPPED)
def test_steps_of_a_part_of_the_images_and_weighted_classes_matter(model, name):
    losses = train(model, short(name)).losses
    assert train(model, short(name), batch_size=2).losses != losses
    assert train(model, short(name), class_weights=torch.tensor([0.5, 1.0, 2.0])).losses != losses


@pytest.mark.parametrize("name", STEPPED + CLOSED)
def test_what_was_trained_is_all_that_it_needs(model, name):
    method = short(name)
    result = train(model, method)
    episode = with_views(2)
    with Job(model, make_tokenizer(), method, 0, Runtime()).learner([episode]) as learner:
        learner.restore({part: value[None] for part, value in result.trained.items()})
        with torch.no_grad():
            inputs = learner.inputs(episode.query_images[None])
            found = learner.logits(inputs, learner.classes())[0]
    torch.testing.assert_close(found, result.query_logits, atol=1e-4, rtol=1e-5)
