"""PLOT against Sinkhorn's iterations in NumPy, and what optimal transport must give."""

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
from fewshot.training_cases import EPISODES, NAMES, draw_episode, make_tokenizer
from tiny_clip import ATTENTION_POOL, make_clip

from tir_kernels.fewshot import Runtime
from tir_kernels.fewshot.methods import plot
from tir_kernels.fewshot.methods.plot import PLOT, transport
from tir_kernels.fewshot.train.batch import Job

FAST = {"steps": 4, "context_lr": 0.05, "context_tokens": 5}


@pytest.fixture(scope="module")
def model():
    return prompt_model()


def sinkhorn(cosines):
    """The plan of one (M, N) matrix of cosines, by factors of rows and columns in float64."""
    m, n = cosines.shape
    kernel = np.exp((cosines - 1) / 0.1)
    r, c = np.ones(m), np.ones(n)
    for taken in range(1, 101):
        before, r = r, 1 / m / (kernel @ c)
        c = 1 / n / (kernel.T @ r)
        if np.abs(r - before).mean() < 1e-2:
            return r[:, None] * kernel * c, taken
    return r[:, None] * kernel * c, 100


def draw_cosines(*shape, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    return spread * (2 * torch.rand(*shape, generator=generator) - 1)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_plans_are_sinkhorns(spread):
    cosines = draw_cosines(3, 2, 49, 4, spread=spread)
    found = transport(cosines)
    steps = set()
    for plan, own in zip(found.flatten(0, 1), cosines.flatten(0, 1), strict=True):
        expected, taken = sinkhorn(own.double().numpy())
        np.testing.assert_allclose(plan, expected, rtol=2e-3, atol=1e-8)
        steps.add(taken)
    assert 1 not in steps
    torch.testing.assert_close(found.sum(-2), torch.full((3, 2, 4), 1 / 4))


def test_marginals_are_uniform_where_iterations_go_on(monkeypatch):
    monkeypatch.setattr(plot, "THRESHOLD", 0.0)
    found = transport(draw_cosines(5, 16, 4, spread=0.5))
    torch.testing.assert_close(found.sum(-2), torch.full((5, 4), 1 / 4))
    torch.testing.assert_close(found.sum(-1), torch.full((5, 16), 1 / 16), rtol=1e-3, atol=1e-6)


def test_a_plan_does_not_depend_on_others():
    quick, slow = draw_cosines(1, 49, 4, spread=0.01), draw_cosines(1, 49, 4)
    assert sinkhorn(quick[0].double().numpy())[1] < sinkhorn(slow[0].double().numpy())[1]
    together = transport(torch.cat([quick, slow]))
    assert torch.equal(together, torch.cat([transport(quick), transport(slow)]))


def test_one_patch_and_one_prompt_give_their_cosine():
    cosines = draw_cosines(7, 1, 1)
    torch.testing.assert_close(transport(cosines), torch.ones(7, 1, 1))


def test_equal_costs_are_spread_evenly_and_extreme_ones_stay_finite():
    torch.testing.assert_close(transport(torch.zeros(2, 9, 4)), torch.full((2, 9, 4), 1 / 36))
    extreme = torch.full((1, 9, 4), -1.0)
    extreme[0, 0, 0] = 1.0
    assert transport(extreme).isfinite().all()


def test_logits(model):
    """Of the model's own last tokens, and of texts with the contexts in front."""
    method = PLOT(steps=1, context_lr=0, context_tokens=5, prompts_per_class=3)
    episode = draw_episode(2, NAMES[1])
    found = learn(model, method, episode)
    contexts = found.trained["context"]
    assert contexts.shape == (3, 1, 5, 32)
    assert contexts.std() == pytest.approx(0.02, rel=0.15)
    tokens = make_tokenizer()([f"a a a a a {name}." for name in episode.class_names])
    texts = []
    with torch.no_grad():
        for context in contexts[:, 0]:
            hidden = model.token_embedding(tokens)
            hidden = torch.cat([hidden[:, :1], context.expand(3, -1, -1), hidden[:, 6:]], 1)
            hidden = hidden + model.positional_embedding
            hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask))
            texts.append(hidden[torch.arange(3), tokens.argmax(1)] @ model.text_projection)
        visual = model.visual
        hidden = visual.transformer(visual._embeds(episode.query_images))
        patches = visual.ln_post(hidden[:, 1:]) @ visual.proj
    texts, patches = (
        each / np.linalg.norm(each, axis=-1, keepdims=True)
        for each in (torch.stack(texts).double().numpy(), patches.double().numpy())
    )
    for image, row in zip(patches, found.query_logits, strict=True):
        for label in range(3):
            cosines = image @ texts[:, label].T
            expected = 100 * (sinkhorn(cosines)[0] * cosines).sum()
            assert row[label].item() == pytest.approx(expected, rel=1e-3, abs=1e-2)


@pytest.mark.slow
def test_no_gradient_flows_through_the_plan(model):
    """The gradient is that of the cosines alone, under a plan that is kept."""
    with Job(model, make_tokenizer(), PLOT(**FAST), 0, Runtime()).learner(EPISODES[:1]) as learner:
        inputs = learner.inputs(EPISODES[0].support_images[None])
        classes = learner.classes().detach().requires_grad_()
        learner.logits(inputs, classes)[0, 0, 0].backward()
        patches = torch.nn.functional.normalize(inputs[0, 0].unflatten(0, (-1, 16)), dim=-1)
        plan = transport(patches @ classes[0, :, 0].detach().T)
    expected = torch.zeros_like(classes)
    expected[0, :, 0] = 100 * plan.T @ patches
    torch.testing.assert_close(classes.grad, expected)


@pytest.mark.slow
def test_it_learns_and_at_once_is_as_alone(model):
    losses = learn(model, PLOT(**FAST), EPISODES[0]).losses
    assert losses[-1] < losses[0]
    assert_at_once_is_as_alone(model, PLOT(**FAST), EPISODES[:2], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_stopped_is_as_never_stopped(precision):
    method = PLOT(steps=14, context_lr=0.05, context_tokens=4)
    assert_stopped_is_as_never_stopped(method, precision, 2, 12)


@pytest.mark.slow
def test_a_classifier_that_was_saved_answers_the_same(tmp_path):
    assert_a_saved_classifier_answers_the_same(PLOT(steps=2), tmp_path)


@pytest.mark.slow
def test_an_attention_pool_is_applied_to_each_patch():
    model = make_clip(ATTENTION_POOL, {"context_length": 20, "vocab_size": 49408})
    found = learn(model, PLOT(**FAST))
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"prompts_per_class": 0}, "prompts_per_class must be at least 1"),
        ({"context_tokens": 0}, "context_tokens must be at least 1"),
        ({"context_lr": -1.0}, "context_lr must be a finite number of at least 0"),
        ({"template": ("a {}", "the {}")}, "template must be one where prompts are trained; got 2"),
    ],
)
def test_other_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PLOT(**wrong)
