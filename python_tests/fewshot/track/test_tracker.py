"""Measures are read of each episode of a training, and change no bit of it."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fewshot.training_cases import EPISODES, METHOD, as_method, draw_episode, make_model
from fewshot.training_cases import make_tokenizer as tokenizer

from tir_kernels import WeightRule, analysis, token_relevance, token_weights
from tir_kernels.fewshot import Runtime, finetune_episode, finetune_episodes
from tir_kernels.fewshot.data.views import with_views
from tir_kernels.fewshot.track.pictures import MapMaker
from tir_kernels.fewshot.track.settings import Tracking
from tir_kernels.fewshot.track.tracker import Tracker
from tir_kernels.towers import vision_tower


def rows(tracker, episode, arm="x"):
    return {row[2:4] + row[5:6]: row for row in tracker.track(episode.index, arm).rows()}


def pixels(images):
    return (images.movedim(1, -1) * 10 + 100).clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"name": "lora"},
        {"name": "tir"},
        {"name": "tir", "placement": "both"},
        {"name": "tir", "relevance": "centroids"},
        {"name": "tir", "selection": "attention"},
        {"name": "tir", "selection": "random", "placement": "attention"},
    ],
    ids=str,
)
def test_tracked_is_as_untracked(changes, number) -> None:
    model = make_model()
    options = {name: value for name, value in changes.items() if name != "name"}
    method = as_method(changes["name"], steps=5, lora_dropout=0.25, **options)
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    plain = finetune_episodes(model, tokenizer(), EPISODES[:number], method)
    tracker, maker = Tracker(model, 2), MapMaker(model, method, pixels)
    tracked = finetune_episodes(
        model, tokenizer(), EPISODES[:number], method, observers=[tracker, maker]
    )
    for one, other in zip(plain, tracked, strict=True):
        assert one.losses == other.losses
        assert torch.equal(one.query_logits, other.query_logits)
        assert all(torch.equal(one.trained[k], other.trained[k]) for k in one.trained)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert tracker.track(EPISODES[0].index, "x").steps == [0, 2, 4, 5]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_tracked_is_as_untracked_on_a_gpu(precision: str) -> None:
    """Where steps are a CUDA graph, but in float16."""
    model = make_model().cuda()
    number = 1 if precision == "float16" else 2
    runtime = Runtime(device="cuda", precision=precision)
    for selection in ("relevance", "attention", "random"):
        method = as_method("tir", steps=12, lora_dropout=0.25, selection=selection)
        plain, tracked = (
            finetune_episodes(
                model,
                tokenizer(),
                EPISODES[:number],
                method,
                runtime=runtime,
                observers=observers,
            )
            for observers in ([], [Tracker(model, 5), MapMaker(model, method, pixels)])
        )
        for one, other in zip(plain, tracked, strict=True):
            assert one.losses == other.losses
            assert torch.equal(one.query_logits, other.query_logits)


def test_rows_are_those_of_the_frozen_tower_before_the_first_step() -> None:
    model = make_model()
    tracker = Tracker(model, 3, ["sink-ratio"])
    finetune_episodes(
        model, tokenizer(), EPISODES[:2], replace(METHOD, steps=3), observers=[tracker]
    )
    lora = Tracker(model, 3, ["sink-ratio"])
    method = as_method("lora", steps=3)
    finetune_episodes(model, tokenizer(), EPISODES[:2], method, observers=[lora])
    measures = [analysis.measure_class("sink-ratio")()]
    for episode in EPISODES[:2]:
        own = rows(lora, episode)
        expected = analysis.measure(
            model, episode.support_images, measures, labels=episode.support_labels
        )
        assert {key[:2] for key in own} == {(step, block) for step in (0, 3) for block in range(5)}
        for finding in expected:
            row = own[0, finding.block, finding.name]
            assert row.measure == "sink-ratio"
            assert row.arm == "x"
            assert row.value == pytest.approx(finding.values.mean().item())
            assert row.chance == pytest.approx(float(torch.as_tensor(finding.chance).mean()))
            # Re-weighting's first block is depth - 4 = 1: nothing before it differs.
            if finding.block == 0:
                assert rows(tracker, episode)[0, 0, finding.name].value == row.value


@pytest.mark.slow
def test_at_once_has_the_rows_of_each_alone() -> None:
    model = make_model()
    method = replace(METHOD, steps=4)
    together = Tracker(model, 2)
    finetune_episodes(model, tokenizer(), EPISODES, method, observers=[together])
    for episode in EPISODES:
        alone = Tracker(model, 2)
        finetune_episode(model, tokenizer(), episode, method, observers=[alone])
        one, other = rows(alone, episode), rows(together, episode)
        assert one.keys() == other.keys()
        for key, row in one.items():
            assert (row.value is None) == (other[key].value is None), key
            if row.value is not None:
                assert row.value == pytest.approx(other[key].value, rel=1e-3, abs=1e-3), key


def test_views_are_left_out() -> None:
    model, episode = make_model(), draw_episode(0, ["a", "b"], shots=2)
    images = (episode.support_images * 20 + 100).clamp(0, 255).to(torch.uint8)
    viewed = with_views(images, 2, np.random.RandomState(0)).float()
    augmented = replace(
        episode,
        support_images=viewed,
        support_labels=episode.support_labels.repeat_interleave(3),
        shots=2,
    )
    found = []
    for own in (augmented, replace(episode, support_images=images.float())):
        tracker = Tracker(model, 1, ["sink-ratio"])
        finetune_episode(model, tokenizer(), own, as_method("lora", steps=1), observers=[tracker])
        found.append({key: row for key, row in rows(tracker, own).items() if row.step == 0})
    assert found[0] == found[1]


def test_frozen_features_have_no_rows() -> None:
    tracker = Tracker(make_model())
    finetune_episode(
        make_model(), tokenizer(), EPISODES[0], as_method("zero-shot"), observers=[tracker]
    )
    assert tracker.track(EPISODES[0].index) is None
    assert tracker.track(99) is None


def test_a_training_that_fails_has_no_numbers_from_then_on() -> None:
    model = make_model()
    broken = replace(EPISODES[0], support_images=EPISODES[0].support_images * math.nan)
    tracker = Tracker(model, 100, ["sink-ratio"])
    finetune_episodes(model, tokenizer(), [broken], METHOD, observers=[tracker])
    assert tracker.track(broken.index, "x").steps == [0, 1]


@pytest.mark.parametrize("name", ["lora", "tir"])
def test_maps_show_the_last_reweighted_block(name) -> None:
    model = make_model()
    method = as_method(name, steps=3)
    maker = MapMaker(model, method, pixels)
    seen = []
    finetune_episodes(model, tokenizer(), EPISODES[:2], method, observers=[maker, Looking(seen)])
    for position, episode in enumerate(EPISODES[:2]):
        maps = maker.maps(episode, "arm")
        own = slice(position * 6, position * 6 + 6)
        assert (maps.episode, maps.arm) == (episode.index, "arm")
        assert maps.class_names == episode.class_names
        assert maps.grid == (4, 4)
        assert np.array_equal(maps.labels, episode.support_labels.numpy())
        assert np.array_equal(maps.images, pixels(episode.support_images))
        tower = vision_tower(model)
        for step, tokens in ((0, maps.tokens_before), (1, maps.tokens_after)):
            expected = torch.stack([output[own, 0] for output in seen[step]["outputs"]])
            np.testing.assert_allclose(tokens, expected.numpy(), atol=2e-3)
        hidden, classes = seen[1]["hidden"], seen[1]["classes"]
        prefix = {"joint_space": tower.joint_space}
        relevance = token_relevance(hidden, classes, **prefix)[own]
        np.testing.assert_allclose(maps.relevance, relevance.numpy(), atol=2e-3)
        rule = method.weight_rule() if name == "tir" else WeightRule("none")
        weights, counts = token_weights(hidden, classes, rule=rule, **prefix)
        assert np.array_equal(maps.counts, counts[own].numpy())
        np.testing.assert_allclose(maps.weights, weights[own, 1:].numpy(), atol=1e-3)
        for step, received in ((0, maps.received_before), (1, maps.received_after)):
            expected = seen[step]["received"][own, 1:]
            np.testing.assert_allclose(received, expected.numpy(), atol=1e-3)


class Looking:
    """Notes by hand what the maps should hold, of block depth - 2 = 3."""

    every = 100

    def __init__(self, seen) -> None:
        self._seen = seen

    def start(self, episodes) -> None:
        pass

    def observe(self, step, learner, inputs) -> None:
        classes = learner.classes()
        learner.logits(inputs, classes)  # which shows them to the tower
        deciding = classes[1] if isinstance(classes, tuple) else classes
        own = {"classes": deciding, "outputs": []}

        class Note:
            name = "note"

            def of_block(self, view):
                own["outputs"].append(view.output.clone())
                if view.block == 3:
                    own["hidden"] = view.hidden.clone()
                    matrix = (view.call.query @ view.call.key.mT * 16**-0.5).softmax(-1)
                    own["received"] = matrix.mean((1, 2))
                return ()

        analysis.measure(learner._encoder._tower, inputs.flatten(0, 1), [Note()])
        self._seen.append(own)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("every=10", Tracking()),
        ("", Tracking()),
        ("maps=0, every=3", Tracking(3, None, 0)),
        ("every=5,measures=sink-ratio", Tracking(5, ("sink-ratio",))),
    ],
)
def test_options_from_text(text, expected) -> None:
    assert Tracking.parse(text) == expected
    assert Tracking.parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10", "must look like"),
        ("every=1,every=2", "must look like"),
        ("often=1", "must look like"),
        ("every=x", "every must be a whole number"),
        ("every=0", "every must be at least 1"),
        ("maps=-1", "maps must be at least 0"),
        ("measures=none", "measure must be one of"),
    ],
)
def test_options_that_are_none(text, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        Tracking.parse(text)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tracking().every = 3
