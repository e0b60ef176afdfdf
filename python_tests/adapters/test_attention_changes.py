"""Changes of attention without text: temperature, suppressed and redistributed sinks."""

import copy
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from adapters.towers_to_change import MODELS, encode
from tiny_clip import Untouched, make_clip, make_images, refused

from tir_kernels import adapters
from tir_kernels.adapters.attention_changes import Redistributed
from tir_kernels.adapters.sinks import above_quartiles, norm_outliers
from tir_kernels.towers import vision_tower
from tir_kernels.towers.attention import attend, attention_matrix
from tir_kernels.towers.protocol import AttentionCall

slow_but_open_clip = [
    pytest.param(name, marks=() if name == "open_clip" else pytest.mark.slow) for name in MODELS
]


def softmax(scores):
    terms = np.exp(scores - scores.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True)


def make_call(seed=0, scale=1.3):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 3, 9, 8, generator=generator)
    return AttentionCall(query, key, value, scale)


def matrix_of(call):
    return softmax(call.scale * call.query.double().numpy() @ call.key.double().mT.numpy())


@pytest.mark.parametrize("keep", [0.0, 0.6])
@pytest.mark.parametrize("most", [0.3, 1.0])
def test_redistribution_is_that_of_the_matrix(keep, most):
    call = make_call()
    is_sink = torch.zeros(2, 9, dtype=torch.bool)
    is_sink[0, [1, 5]] = is_sink[1, 8] = True
    plain = matrix_of(call)
    sinks = is_sink.numpy()[:, None, None]
    mass = (plain * sinks).sum(-1, keepdims=True)
    moved = np.where(sinks, keep * plain, plain + (1 - keep) * mass * plain / (1 - mass))
    expected = np.where(mass <= most, moved, plain)
    np.testing.assert_allclose(expected.sum(-1), 1)
    is_gated = (mass > most).mean()
    assert 0 < is_gated < 1 if most < 1 else is_gated == 0
    changed = call._replace(key_weights=Redistributed(is_sink, keep, most, call))
    np.testing.assert_allclose(attention_matrix(changed), expected, rtol=1e-4, atol=1e-5)
    found = attend(changed)
    np.testing.assert_allclose(found, expected @ call.value.double().numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(expected - plain).max() > 0.05


def test_redistribution_of_all_or_no_keys_is_plain_attention():
    call = make_call()
    plain = attend(call)
    for is_sink in (torch.zeros(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)):
        changed = call._replace(key_weights=Redistributed(is_sink, 0.5, 1.0, call))
        assert torch.equal(attend(changed), plain)
        torch.testing.assert_close(attention_matrix(changed), attention_matrix(call))


def test_redistribution_has_gradients():
    call = make_call()
    is_sink = torch.zeros(2, 9, dtype=torch.bool)
    is_sink[:, 2] = True
    value = call.value.clone().requires_grad_()
    changed = call._replace(key_weights=Redistributed(is_sink, 0.6, 1.0, call), value=value)
    (found,) = torch.autograd.grad(attend(changed).sum(), value)
    expected = attention_matrix(changed).sum(2)[..., None].expand_as(found)
    torch.testing.assert_close(found, expected)


class Reader:
    """Keeps what enters a block, and the call of its attention."""

    def __init__(self):
        self.hidden, self.call = None, None

    def enter(self, hidden):
        self.hidden = hidden
        return hidden, self.read

    def read(self, call, hidden):
        self.call = call
        return call


@contextmanager
def readers_around(model, layer, add):
    """Readers in front of a change of a block and behind it."""
    first, second = Reader(), Reader()
    block = vision_tower(model).blocks[layer]
    block.put(first, changes_attention=True)
    with add() as handle:
        block.put(second, changes_attention=True)
        yield first, second, handle
    block.take(first)
    block.take(second)


@pytest.mark.parametrize("name", slow_but_open_clip)
@torch.no_grad()
def test_a_temperature_scales_the_scores(name):
    model, images = MODELS[name](), make_images()
    before, plain = Untouched(model), encode(model, images)
    add = partial(adapters.add_attention_temperature, model, 3.0, [1])
    with readers_around(model, 1, add) as (first, second, handle):
        assert handle.layers == (1,)
        found = encode(model, images)
        width = first.call.query.shape[-1]
        scale = width**-0.5 if first.call.scale is None else first.call.scale
        assert second.call.scale == 3.0 * scale
        assert all(map(torch.equal, first.call[:3], second.call[:3]))
    assert not torch.allclose(found, plain, atol=1e-3)
    with adapters.add_attention_temperature(model, 1.0):
        torch.testing.assert_close(encode(model, images), plain, rtol=1e-4, atol=1e-5)
    before.check()


@torch.no_grad()
def test_a_temperature_is_a_factor_of_the_queries():
    model, images = make_clip(), make_images()
    twice = copy.deepcopy(model)
    for block in twice.visual.transformer.resblocks:
        block.attn.in_proj_weight[:32] *= 2
        block.attn.in_proj_bias[:32] *= 2
    with adapters.add_attention_temperature(model, 2.0):
        found = model.encode_image(images)
    torch.testing.assert_close(found, twice.encode_image(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_at_temperature_zero_all_tokens_attend_alike():
    model = make_clip()
    add = partial(adapters.add_attention_temperature, model, 0)
    with readers_around(model, 3, add) as (_, reader, _):
        model.encode_image(make_images())
    call = reader.call
    assert call.scale == 0
    torch.testing.assert_close(attention_matrix(call), torch.full((4, 2, 17, 17), 1 / 17))
    mean = call.value.mean(2, keepdim=True).expand_as(call.value)
    torch.testing.assert_close(attend(call), mean)


class Always:
    """The same patches of every image."""

    def __init__(self, *patches):
        self.patches = patches

    def __call__(self, block, layer, hidden, num_prefix_tokens):
        chosen = torch.zeros(len(hidden), hidden.shape[1] - num_prefix_tokens, dtype=torch.bool)
        chosen[:, list(self.patches)] = True
        return chosen


@pytest.mark.parametrize("name", slow_but_open_clip)
@torch.no_grad()
def test_redistribution_of_everything_is_a_weight_of_zero(name):
    model, images, sinks = MODELS[name](), make_images(), Always(3, 7)
    before, plain = Untouched(model), encode(model, images)
    with adapters.add_sink_suppression(model, sinks, 0.0, [1, 2]):
        expected = encode(model, images)
    with adapters.add_sink_redistribution(model, sinks, 0.0, 1.0, [1, 2]):
        torch.testing.assert_close(encode(model, images), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with adapters.add_sink_redistribution(model, sinks, 1.0, 1.0, [1]):
        torch.testing.assert_close(encode(model, images), plain, rtol=1e-4, atol=1e-5)
    with adapters.add_sink_suppression(model, sinks, 1.0, [1, 2]):
        torch.testing.assert_close(encode(model, images), plain, rtol=1e-4, atol=1e-5)
    before.check()


@pytest.mark.parametrize("placement", ["tokens", "attention", "both", "values"])
@torch.no_grad()
def test_suppression_places_its_weight(placement):
    model = make_clip()
    sinks = Always(0, 15)
    add = partial(adapters.add_sink_suppression, model, sinks, 0.25, [2], placement)
    with readers_around(model, 2, add) as (first, second, _):
        model.encode_image(make_images())
    weights = torch.ones(4, 17)
    weights[:, [1, 16]] = 0.25  # behind the class token
    tokens = weights[..., None] if placement in ("tokens", "both") else 1
    torch.testing.assert_close(second.hidden, first.hidden * tokens)
    if placement in ("attention", "both"):
        assert torch.equal(second.call.key_weights, weights)
    else:
        assert second.call.key_weights is None
    values = weights[:, None, :, None] if placement == "values" else 1
    torch.testing.assert_close(second.call.value, first.call.value * values)


@torch.no_grad()
def test_sinks_are_the_most_attended_the_outliers_or_as_many_at_random():
    model, images = make_clip(), make_images()
    block = vision_tower(model).blocks[2]
    twin = block.twin()
    hidden = vision_tower(model).embed(images)

    class Opens:
        def enter(self, hidden):
            return hidden, None

    twin.put(Opens(), changes_attention=True)
    call = twin.attention_of(hidden)
    received = matrix_of(call._replace(scale=16**-0.5)).mean((1, 2))[:, 1:]
    most = adapters.FirstOf(adapters.MostAttended(), 3)(twin, 2, hidden, 1)
    for own, row in zip(most, received, strict=True):
        assert set(own.nonzero()[:, 0].tolist()) == set(np.argsort(-row)[:3].tolist())
    order = adapters.RandomOrder([5, 6])
    random = adapters.FirstOf(order, 3)(twin, 2, hidden, 1)
    assert random.sum(1).tolist() == [3] * 4
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[1], random[2])
    assert adapters.FirstOf(order, 99)(twin, 2, hidden, 1).all()
    hidden[1, 4] *= 50
    outliers = adapters.NormOutliers()(twin, 2, hidden, 1)
    assert outliers.nonzero().tolist() == [[1, 3]]
    assert adapters.NormOutliers(cut=1e9)(twin, 2, hidden, 1).sum() == 0


def test_outliers_by_hand():
    norms = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 40.0])
    patches = torch.tensor(norms)[None, :, None] * torch.tensor([0.6, 0.8])
    median = np.median(norms)
    cut = median + 6 * 1.4826 * np.median(np.abs(norms - median))
    assert norm_outliers(patches).tolist() == [(norms > cut).tolist()]
    assert norm_outliers(patches, cut=3.5).tolist() == [[False] * 3 + [True] * 3]
    values = np.array([0.1, 0.2, 0.25, 0.3, 0.35, 0.9, 0.56])
    first, third = np.percentile(values, [25, 75])
    expected = (values > third + 1.5 * (third - first)).tolist()
    assert above_quartiles(torch.tensor(values)[None]).tolist() == [expected]
    assert sum(expected) == 1


@pytest.mark.parametrize(
    ("add", "kind", "message"),
    [
        (lambda m: adapters.add_attention_temperature(m, float("nan")), ValueError, "temperature"),
        (lambda m: adapters.add_attention_temperature(m, 1, [6]), ValueError, "between 0 and 5"),
        (lambda m: adapters.add_sink_suppression(m, Always(), 0, [1], "x"), ValueError, "placemen"),
        (lambda m: adapters.add_sink_redistribution(m, Always(), 1.5), ValueError, "keep must lie"),
        (lambda m: adapters.add_sink_redistribution(m, Always(), 1, -1), ValueError, "most must"),
    ],
)
def test_wrong_arguments_are_refused(add, kind, message):
    model = make_clip()
    with refused(model, kind, message):
        add(model)


def test_shallow_towers_need_layers():
    model = make_clip({"layers": 3})
    with refused(model, ValueError, "layers must be given for a tower of 3 blocks"):
        adapters.add_sink_redistribution(model, Always(0))
    with refused(model, ValueError, "layers must be given for a tower of 3 blocks"):
        adapters.add_sink_suppression(model, Always(0))


@torch.no_grad()
def test_weights_beside_a_rule_are_refused_and_those_before_it_count():
    model, images = make_clip(), make_images()
    classes = torch.randn(5, 16)
    with (
        adapters.add_sink_redistribution(model, Always(3), 0.5, layers=[2]),
        adapters.add_reweighting(model, [2], "both") as reweighting,
    ):
        reweighting.set_class_embeddings(classes)
        with pytest.raises(TypeError, match=r"changed by Redistributed.*call remove\(\)"):
            model.encode_image(images)
    with adapters.add_reweighting(model, [2], "attention") as reweighting:
        reweighting.set_class_embeddings(classes)
        weighted = model.encode_image(images)
        with adapters.add_sink_redistribution(model, Always(3), 1.0, 1.0, layers=[2]):
            torch.testing.assert_close(model.encode_image(images), weighted, rtol=1e-4, atol=1e-5)
        with adapters.add_sink_redistribution(model, Always(3), 0.0, 1.0, layers=[2]):
            assert not torch.allclose(model.encode_image(images), weighted, atol=1e-4)
