"""CoCoOp against a plain loop of PyTorch's; without its network it is CoOp."""

import numpy as np
import pytest
import torch
from fewshot.method_cases import (
    assert_a_saved_classifier_answers_the_same,
    assert_at_once_is_as_alone,
    assert_stopped_is_as_never_stopped,
    learn,
    prompt_model,
)
from fewshot.methods.test_coop import text_features
from fewshot.training_cases import EPISODES, make_tokenizer
from torch.nn.functional import cross_entropy, linear, normalize

from tir_kernels.fewshot import Runtime
from tir_kernels.fewshot.methods import cocoop
from tir_kernels.fewshot.methods.cocoop import CoCoOp
from tir_kernels.fewshot.methods.coop import CoOp
from tir_kernels.fewshot.train.batch import Job

FAST = {"steps": 4, "context_lr": 0.02}


@pytest.fixture(scope="module")
def model():
    return prompt_model()


def logits(model, images, tokens, trained):
    """100 cosines, image by image."""
    context, weight, bias, second_weight, second_bias = trained
    rows = []
    for feature in model.encode_image(images, normalize=True).detach():
        shift = linear(linear(feature, weight, bias).relu(), second_weight, second_bias)
        texts = text_features(model, tokens, (context + shift).expand(len(tokens), -1, -1))
        rows.append(100 * normalize(texts, dim=-1) @ feature)
    return torch.stack(rows)


@pytest.mark.slow
def test_steps_are_those_of_a_plain_loop(model):
    episode = EPISODES[1]
    with Job(model, make_tokenizer(), CoCoOp(), 0, Runtime()).learner([episode]) as learner:
        trained = [each[0].detach().clone() for each in learner.trained().values()]
    assert [tuple(each.shape) for each in trained] == [(4, 32), (1, 16), (1,), (32, 1), (32,)]
    trained = [each.requires_grad_() for each in trained]
    tokens = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
    assert torch.equal(trained[0], model.token_embedding(tokens)[0, 1:5])
    rates = [1e-5] + [0.02 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(3)]
    optimizer = torch.optim.SGD(trained, lr=1.0, momentum=0.9, weight_decay=5e-4)
    losses = []
    for rate in rates:
        found = logits(model, episode.support_images, tokens, trained)
        loss = cross_entropy(found, episode.support_labels)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.zero_grad(set_to_none=True)
    found = learn(model, CoCoOp(**FAST), episode)
    assert abs(losses[0] - losses[-1]) > 0.1
    torch.testing.assert_close(found.losses, losses, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        expected = logits(model, episode.query_images, tokens, trained)
    torch.testing.assert_close(found.query_logits, expected, rtol=1e-3, atol=1e-2)


def test_without_its_network_it_is_coop(model):
    episode, kinds = EPISODES[0], (CoOp(**FAST), CoCoOp(**FAST))
    context = learn(model, kinds[0], episode).trained["context"]  # (1, M, W)
    found = []
    for method in kinds:
        with Job(model, make_tokenizer(), method, 0, Runtime()).learner([episode]) as learner:
            trained = {name: each.detach().clone() for name, each in learner.trained().items()}
            trained["context"] = context[None] if isinstance(method, CoOp) else context
            for name in trained:
                if name.startswith("network.2"):
                    trained[name].zero_()
            learner.restore(trained)
            inputs = learner.inputs(episode.query_images[None])
            found.append(learner.logits(inputs, learner.classes()).detach())
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
def test_at_once_is_as_alone(model):
    assert_at_once_is_as_alone(model, CoCoOp(**FAST), EPISODES, atol=5e-3)


@pytest.mark.slow
def test_parts_are_the_whole_in_less_memory(model, monkeypatch):
    from tir_kernels.fewshot.train.batch import cost_of_a_step

    expected = learn(model, CoCoOp(**FAST))
    job = Job(model, make_tokenizer(), CoCoOp(**FAST), 0, Runtime())
    whole = cost_of_a_step(job, EPISODES[:1]).kept_bytes
    seen = []
    encode = cocoop._Conditional._cosines

    def spy(self, features, contexts):
        seen.append(features.shape[1])
        return encode(self, features, contexts)

    monkeypatch.setattr(cocoop, "PROMPTS_AT_ONCE", 7)  # two images of three classes
    monkeypatch.setattr(cocoop._Conditional, "_cosines", spy)
    found = learn(model, CoCoOp(**FAST))
    assert set(seen) <= {1, 2}
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.query_logits, expected.query_logits, rtol=1e-4, atol=1e-3)
    assert cost_of_a_step(job, EPISODES[:1]).kept_bytes < whole / 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_stopped_is_as_never_stopped(precision):
    method = CoCoOp(steps=14, context_lr=0.02)
    assert_stopped_is_as_never_stopped(method, precision, 2, 12)


@pytest.mark.slow
def test_a_classifier_that_was_saved_answers_the_same(tmp_path):
    assert_a_saved_classifier_answers_the_same(CoCoOp(steps=2), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"context_tokens": 0}, "context_tokens must be at least 1"),
        ({"context_lr": -1.0}, "context_lr must be a finite number of at least 0"),
        ({"template": ("a {}", "the {}")}, "template must be one where prompts are trained; got 2"),
    ],
)
def test_other_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CoCoOp(**wrong)
