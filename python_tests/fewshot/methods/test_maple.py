"""MaPLe against a plain loop with hooks of PyTorch's, and what it refuses."""

import numpy as np
import pytest
import torch
from fewshot.method_cases import (
    assert_at_once_is_as_alone,
    assert_stopped_is_as_never_stopped,
    learn,
    prompt_model,
)
from fewshot.training_cases import EPISODES, NAMES, draw_episode, make_tokenizer
from hooked_modules import hooked
from tiny_clip import ATTENTION_POOL, Untouched, make_clip
from torch.nn.functional import cross_entropy

from tir_kernels import fewshot
from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.fewshot import Runtime, finetune_episode
from tir_kernels.fewshot.methods.maple import MaPLe
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.train.batch import Job
from tir_kernels.towers.loading.models import load_model

FAST = {"steps": 4, "prompt_lr": 0.02}


@pytest.fixture(scope="module")
def model():
    return prompt_model()


def logits(model, images, texts, prompts):
    """100 cosines with deep prompts, which hooks put in front of the model's own blocks."""
    context, deep, weight, bias = prompts
    count = len(context)
    own = [q @ f.T + b for q, f, b in zip([context, *deep], weight, bias, strict=True)]
    images_of = lambda q: q.expand(len(images), -1, -1)  # noqa: E731
    texts_of = lambda p: p.expand(len(texts), -1, -1)  # noqa: E731
    places = [
        (model.visual.ln_pre, lambda t: torch.cat([t, images_of(own[0])], 1), False),
    ]
    for block, q in zip(model.visual.transformer.resblocks[1:], own[1:], strict=False):
        places.append((block, lambda t, q=q: torch.cat([t[:, :-count], images_of(q)], 1), True))
    blocks = model.transformer.resblocks
    for j, p in enumerate([context, *deep]):
        position = model.positional_embedding[1 : 1 + count] if j == 0 else 0

        def put(t, p=p, position=position):
            return torch.cat([t[:, :1], texts_of(p + position), t[:, 1 + count :]], 1)

        places.append((blocks[j], put, True))
    with hooked(places):
        f, t = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    return 100 * f @ t.T


@pytest.mark.parametrize("depth", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_steps_are_those_of_a_plain_loop(model, depth):
    episode = EPISODES[1]
    job = Job(model, make_tokenizer(), MaPLe(prompt_depth=depth, steps=4), 0, Runtime())
    with job.learner([episode]) as learner:
        start = {name: each[0].detach().clone() for name, each in learner.trained().items()}
    prompts = [each.requires_grad_() for each in start.values()]
    texts = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
    assert torch.equal(prompts[0], model.token_embedding(texts)[0, 1:3])
    rates = [1e-5] + [0.02 * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(3)]
    optimizer = torch.optim.SGD(prompts, lr=1.0, momentum=0.9, weight_decay=5e-4)
    losses = []
    for rate in rates:
        loss = cross_entropy(
            logits(model, episode.support_images, texts, prompts), episode.support_labels
        )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.zero_grad(set_to_none=True)
    found = learn(model, MaPLe(**FAST, prompt_depth=depth), episode)
    assert abs(losses[0] - losses[-1]) > 0.1
    torch.testing.assert_close(found.losses, losses, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        expected = logits(model, episode.query_images, texts, prompts)
    torch.testing.assert_close(found.query_logits, expected, rtol=1e-3, atol=1e-2)


def test_prompts_start_as_published(model):
    method = MaPLe(prompt_lr=0, steps=1)
    trained = learn(model, method).trained
    shapes = {name: tuple(each.shape) for name, each in trained.items()}
    assert shapes == {
        "context": (2, 32),
        "deep": (2, 2, 32),  # of a text tower of three blocks
        "coupling.weight": (3, 32, 32),
        "coupling.bias": (3, 32),
    }
    weight = trained["coupling.weight"]
    assert torch.equal(weight[1], weight[2])
    assert not (weight[0] == weight[1]).any()
    for each in (weight[:2], trained["coupling.bias"][:2]):
        assert 0.8 * 32**-0.5 < each.abs().max() <= 32**-0.5
        assert each.abs().mean() == pytest.approx(0.5 * 32**-0.5, rel=0.2)
    assert trained["deep"].std() == pytest.approx(0.02, rel=0.2)
    assert not (learn(model, method, EPISODES[1]).trained["deep"] == trained["deep"]).any()


@pytest.mark.parametrize("template", [None, ("a blurry scan of one {}, from above.",)])
def test_the_texts_of_shallow_prompts_start_as_zero_shots(model, template):
    shallow = MaPLe(prompt_depth=1, template=template)
    own = []
    for method in (shallow, ZeroShot(template=template)):
        with Job(model, make_tokenizer(), method, 0, Runtime()).learner(EPISODES[:2]) as learner:
            own.append(learner.classes().detach())
    assert torch.equal(*own)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, None])
def test_at_once_is_as_alone(model, depth):
    method = MaPLe(**FAST, prompt_depth=depth)
    assert_at_once_is_as_alone(model, method, EPISODES, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_stopped_is_as_never_stopped(precision):
    method = MaPLe(steps=14, prompt_lr=0.02)
    assert_stopped_is_as_never_stopped(method, precision, 2, 12)


@pytest.mark.slow
def test_checkpoints_change_nothing(model):
    expected = learn(model, MaPLe(**FAST))
    found = learn(model, MaPLe(**FAST), runtime=Runtime(checkpoint=True))
    assert found.losses == expected.losses


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
def test_a_classifier_that_was_saved_answers_the_same(tmp_path, depth):
    write_image_folder(tmp_path / "images")
    settings = fewshot.FitSettings(shots=2, folds=0)
    made = fewshot.fit(
        tmp_path / "images",
        str(model_directory()),
        method=MaPLe(steps=2, prompt_depth=depth),
        settings=settings,
    )
    paths = sorted(tmp_path.rglob("*.png"))[:6]
    before = Untouched(made.model.model)
    expected = made.predict(paths)
    before.check()
    alone = torch.cat([made.predict([path]) for path in paths])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    made.save(tmp_path / "classifier")
    assert torch.equal(fewshot.load_classifier(tmp_path / "classifier").predict(paths), expected)


@pytest.mark.slow
def test_measures_pass_by(model):
    """They would take its prompts for patches of the image."""
    from tir_kernels.fewshot.track.tracker import Tracker

    tracker = Tracker(model, every=1)
    plain = learn(model, MaPLe(**FAST))
    tracked = learn(model, MaPLe(**FAST), observers=[tracker])
    assert tracked.losses == plain.losses
    assert tracker.track(EPISODES[0].index) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_depth": 4}, "prompt_depth must be at most 3, the blocks of the shallower tower"),
        ({"prompt_tokens": 5}, "prompt_tokens must be at most 4, the tokens in front of the name"),
        (
            {"template": ("{} on a table",)},
            "prompt_tokens must be at most 0, .*; got 2: set template to one with more",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, wrong, message):
    before = Untouched(model)
    with pytest.raises(ValueError, match=message):
        learn(model, MaPLe(**wrong))
    before.check()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
        ({"prompt_depth": 0}, "prompt_depth must be at least 1"),
        ({"prompt_lr": -1.0}, "prompt_lr must be a finite number of at least 0"),
        ({"template": ("a {}", "the {}")}, "template must be one where prompts are trained; got 2"),
    ],
)
def test_other_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MaPLe(**wrong)


@pytest.mark.slow
def test_it_trains_on_a_model_of_transformers(tmp_path):
    pytest.importorskip("small_transformers").write_folder(tmp_path, "clip")
    loaded = load_model(str(tmp_path))
    before = Untouched(loaded.model)
    method = MaPLe(steps=8, prompt_tokens=1, prompt_lr=0.01, logit_scale=10)
    episode = draw_episode(0, ["cat", "dog"])
    found = finetune_episode(loaded.model, loaded.tokenizer, episode, method)
    assert found.losses[-1] < found.losses[0]
    before.check()


def test_towers_without_a_class_token_are_refused():
    words = {"context_length": 20, "vocab_size": 49408}
    with pytest.raises(TypeError, match="deep prompts need an image tower that pools its class"):
        learn(make_clip(ATTENTION_POOL, words), MaPLe(), draw_episode(0, NAMES[1]))
