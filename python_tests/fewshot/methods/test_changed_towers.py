"""Methods that change a frozen tower's forward pass: what they are compared with, and how."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fewshot.training_cases import EPISODES, NAMES, draw_episode, make_model, make_tokenizer

from tir_kernels import adapters, fewshot
from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.fewshot import finetune_episode, finetune_episodes
from tir_kernels.fewshot.methods import method_class
from tir_kernels.fewshot.methods.centroid import Centroid
from tir_kernels.fewshot.methods.paint import Paint
from tir_kernels.fewshot.methods.sink_redistribution import SinkRedistribution
from tir_kernels.fewshot.methods.sink_suppression import SinkSuppression
from tir_kernels.fewshot.methods.temperature import AttentionTemperature
from tir_kernels.fewshot.methods.zero_shot import ZeroShot

NEUTRAL = [
    AttentionTemperature(attention_temperature=1),
    SinkSuppression(sink_weight=1),
    SinkRedistribution(kept_share=1),
    Paint(local_gain=0, summary_gain=0),
]
CHANGED = [
    AttentionTemperature(attention_temperature=0, layers=(1, -1)),
    SinkSuppression(num_sinks=2),
    SinkSuppression(num_sinks=2, sinks="random", placement="values"),
    SinkRedistribution(sinks="attention", most_share=1.0),
    SinkRedistribution(sinks="random", num_sinks=3),
    Paint(),
]


def named(method):
    own = [value for value in vars(method).values() if isinstance(value, str)]
    return "-".join([method.name, *own])


def by_centroids(method):
    return type(method)(**(vars(method) | {"classifier": "centroid"}))


@pytest.fixture(scope="module")
def model():
    return make_model()


def learn(model, method, episode=EPISODES[0]):
    return finetune_episode(model, make_tokenizer(), episode, method)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("method", NEUTRAL, ids=named)
def test_the_neutral_setting_is_zero_shot_or_centroid(model, method):
    expected = learn(model, ZeroShot()).query_logits
    assert torch.equal(learn(model, method).query_logits, expected)
    views = EPISODES[0].support_images + torch.tensor([0.0, 0.5])[:, None, None, None, None]
    episode = replace(
        EPISODES[0],
        support_images=views.transpose(0, 1).flatten(0, 1),
        support_labels=EPISODES[0].support_labels.repeat_interleave(2),
        shots=2,
    )
    expected = learn(model, Centroid(logit_scale=4.0), episode).query_logits
    found = learn(model, by_centroids(method), episode).query_logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", CHANGED, ids=named)
def test_logits_are_cosines_of_the_changed_features(model, method):
    episode = draw_episode(3, NAMES[1])
    plain = learn(model, ZeroShot(), episode).query_logits.numpy()
    found = learn(model, method, episode).query_logits.numpy()
    assert np.abs(found - plain).max() > 1e-3
    if method.name != "attention-temperature":
        return
    changed = copy.deepcopy(model)
    prompts = make_tokenizer()([f"a photo of a {name}." for name in episode.class_names])
    with torch.no_grad():
        text = changed.encode_text(prompts).double().numpy()
        adapters.add_attention_temperature(changed, 0, (1, -1))
        query, support = (
            changed.encode_image(images).double().numpy()
            for images in (episode.query_images, episode.support_images)
        )
    np.testing.assert_allclose(found, 4 * unit(query) @ unit(text).T, rtol=1e-3, atol=1e-3)
    labels = episode.support_labels.numpy()
    centroids = unit(np.stack([unit(support)[labels == c].mean(0) for c in range(3)]))
    result = learn(model, by_centroids(method), episode)
    np.testing.assert_allclose(result.query_logits, 4 * unit(query) @ centroids.T, atol=1e-3)
    np.testing.assert_allclose(result.trained["centroids"], centroids, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("classifier", ["text", "centroid"])
@pytest.mark.parametrize("method", CHANGED, ids=named)
def test_at_once_is_as_alone(model, method, classifier):
    method = method if classifier == "text" else by_centroids(method)
    together = finetune_episodes(model, make_tokenizer(), EPISODES, method)
    for episode, result in zip(EPISODES, together, strict=True):
        alone = learn(model, method, episode)
        torch.testing.assert_close(result.query_logits, alone.query_logits, atol=1e-4, rtol=0)
        assert result.losses == []


def test_features_are_shared_where_they_follow_from_the_image_alone(model):
    """And not between settings that differ."""
    kinds = [method.inputs_kind(None) for method in CHANGED]
    assert [kind is None for kind in kinds] == ["random" in named(method) for method in CHANGED]
    assert len({kind for kind in kinds if kind is not None}) == 4
    first, second = SinkSuppression(), SinkSuppression(classifier="centroid", logit_scale=3)
    assert first.inputs_kind(None) == second.inputs_kind(None)
    assert first.inputs_kind(None) != SinkSuppression(sink_weight=0.5).inputs_kind(None)
    both = [SinkSuppression(sinks="random"), SinkSuppression(sinks="random")]
    found = [learn(model, method).query_logits for method in both]
    assert torch.equal(*found)
    assert not torch.allclose(found[0], learn(model, both[0], EPISODES[1]).query_logits)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AttentionTemperature, {"attention_temperature": -1}, "attention_temperature must be"),
        (AttentionTemperature, {"classifier": "images"}, "classifier must be one of text, cent"),
        (SinkSuppression, {"sinks": "norms"}, "sinks must be one of attention, norm, random"),
        (SinkSuppression, {"num_sinks": -1}, "num_sinks must be at least 0"),
        (SinkRedistribution, {"kept_share": 1.5}, "kept_share must lie in"),
        (SinkRedistribution, {"most_share": -1}, "most_share must lie in"),
        (Paint, {"local_share": 2}, "local_share must lie in"),
    ],
)
def test_what_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sink-suppression", "paint", "test-time-registers"])
def test_a_saved_classifier_answers_the_same(name, tmp_path):
    write_image_folder(tmp_path / "all")
    data = tmp_path / "images"
    for folder in sorted(each for each in (tmp_path / "all").iterdir() if each.is_dir())[:3]:
        (data / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:4]:
            shutil.copy(path, data / folder.name)
    own = {"norm_cut": 1.0, "register_neurons": 4} if name == "test-time-registers" else {}
    method = method_class(name)(classifier="centroid", **own)
    settings = fewshot.FitSettings(shots=2, folds=2)
    made = fewshot.fit(data, str(model_directory()), method=method, settings=settings)
    paths = sorted(data.rglob("*.*"))
    expected = made.predict(paths)
    made.save(tmp_path / "classifier")
    read = fewshot.load_classifier(tmp_path / "classifier")
    torch.testing.assert_close(read.predict(paths), expected)
    if own:
        assert (made.learned["neurons"] >= 0).all()
