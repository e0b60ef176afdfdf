"""CoOp against a plain loop of PyTorch's, and the settings at which it is zero-shot."""

import numpy as np
import pytest
import torch
from fewshot.method_cases import (
    assert_a_saved_classifier_answers_the_same,
    assert_at_once_is_as_alone,
    assert_stopped_is_as_never_stopped,
)
from fewshot.training_cases import (
    EPISODES,
    NAMES,
    draw_episode,
    make_model,
    make_tokenizer,
)

from tir_kernels.fewshot import finetune_episode
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.methods.coop import CoOp
from tir_kernels.fewshot.methods.zero_shot import ZeroShot

FAST = {"steps": 4, "context_lr": 0.1}
KINDS = {
    "words": CoOp(**FAST),
    "more words": CoOp(**FAST, context_tokens=6),
    "random": CoOp(**FAST, context_tokens=7, context_start="random"),
    "per class": CoOp(**FAST, context_scope="per-class"),
    "random per class": CoOp(**FAST, context_start="random", context_scope="per-class"),
}
SCOPES = ["shared", pytest.param("per-class", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model():
    made = make_model()
    made.token_embedding.half().float()  # as the program keeps the prompts' words
    return made


def learn(model, method, episode=EPISODES[0]):
    return finetune_episode(model, make_tokenizer(), episode, method)


def text_features(model, tokens, context):
    """CLIP's text tower by its own modules, with (C, M, W) in place of the first words."""
    embedded = model.token_embedding(tokens)
    embedded = torch.cat([embedded[:, :1], context, embedded[:, 1 + context.shape[1] :]], 1)
    hidden = embedded + model.positional_embedding
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask))
    return hidden[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text_projection


@pytest.mark.parametrize("scope", SCOPES)
def test_steps_are_those_of_a_plain_loop(model, scope):
    episode = EPISODES[1]
    tokens = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
    with torch.no_grad():
        start = model.token_embedding(tokens)[:, 1:5]
        images = model.encode_image(episode.support_images, normalize=True)
    context = (start if scope == "per-class" else start[:1]).clone().requires_grad_()
    # Three steps: after more of them rounding has grown beyond the tolerance.
    rates = [1e-5] + [0.1 * (1 + np.cos(np.pi * step / 3)) / 2 for step in range(2)]
    optimizer = torch.optim.SGD([context], lr=1.0, momentum=0.9, weight_decay=5e-4)
    losses = []
    for rate in rates:
        texts = text_features(model, tokens, context.expand(3, -1, -1))
        logits = 100 * images @ torch.nn.functional.normalize(texts, dim=-1).T
        loss = torch.nn.functional.cross_entropy(logits, episode.support_labels)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = learn(model, CoOp(steps=3, context_lr=0.1, context_scope=scope), episode)
    assert abs(losses[0] - losses[-1]) > 0.1
    torch.testing.assert_close(found.losses, losses, rtol=1e-4, atol=1e-4)
    assert found.trained["context"].shape == (3 if scope == "per-class" else 1, 4, 32)
    torch.testing.assert_close(found.trained["context"], context.detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_without_a_rate_it_is_zero_shot(model, scope):
    method = CoOp(steps=2, context_lr=0, context_scope=scope)
    for template in (None, ("a photo of a {}.",)):
        expected = learn(model, ZeroShot(logit_scale=100, template=template)).query_logits
        found = learn(model, CoOp(**as_settings(method) | {"template": template}))
        assert torch.equal(found.query_logits, expected)


def test_random_contexts_are_of_the_published_spread(model):
    method = CoOp(steps=1, context_lr=0, context_tokens=12, context_start="random")
    one = learn(model, method, draw_episode(1, ["cat", "dog"])).trained["context"]
    other = learn(model, method, draw_episode(2, ["cat", "dog"])).trained["context"]
    assert one.shape == (1, 12, 32)
    assert one.std() == pytest.approx(0.02, rel=0.1)
    assert abs(one.mean()) < 0.004
    assert not (one == other).any()
    method = CoOp(steps=1, context_lr=0, context_start="random", context_scope="per-class")
    own = learn(model, method, draw_episode(1, ["cat", "dog"])).trained["context"]
    assert own.shape == (2, 4, 32)
    assert not (own[0] == own[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_once_is_as_alone(model, kind):
    assert_at_once_is_as_alone(model, KINDS[kind], EPISODES, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_stopped_is_as_never_stopped(precision):
    # In float16 the first steps overflow, until their loss is scaled down.
    method = CoOp(steps=14, context_lr=0.1, context_start="random")
    assert_stopped_is_as_never_stopped(method, precision, 2, 12)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["shared", "per-class"])
def test_a_classifier_that_was_saved_answers_the_same(tmp_path, scope):
    method = CoOp(steps=2, context_tokens=6, context_start="random", context_scope=scope)
    assert_a_saved_classifier_answers_the_same(method, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"context_tokens": 0}, "context_tokens must be at least 1"),
        ({"context_tokens": 2000}, "context_tokens must be at most 1024"),
        ({"context_start": "noise"}, "context_start must be one of words, random; got 'noise'"),
        ({"context_scope": "own"}, "context_scope must be one of shared, per-class; got 'own'"),
        ({"context_lr": -1.0}, "context_lr must be a finite number of at least 0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number"),
        ({"template": ("a {}", "the {}")}, "template must be one where prompts are trained; got 2"),
    ],
)
def test_other_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CoOp(**wrong)


def test_more_vectors_than_the_tower_has_room_for_are_refused(model):
    with pytest.raises(ValueError, match="num_vectors=40 leaves no room for names"):
        learn(model, CoOp(context_tokens=40), draw_episode(0, NAMES[1]))
