"""PAINT: the class token's scores for chosen patches."""

from functools import partial

import numpy as np
import pytest
import timm_models
import torch
from adapters.towers_to_change import MODELS, encode
from tiny_clip import Untouched, make_clip, make_images, refused

from tir_kernels import adapters
from tir_kernels.adapters.informed_tokens import Informed, InformedTokens
from tir_kernels.towers import vision_tower
from tir_kernels.towers.attention import attend, attention_matrix
from tir_kernels.towers.protocol import AttentionCall

WITH_CLASS_TOKEN = [
    pytest.param(name, marks=() if name == "open_clip" else pytest.mark.slow)
    for name in ("open_clip", "length first", "timm", "timm registers", "rotary", "own blocks")
]


def softmax(scores):
    terms = np.exp(scores - scores.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True)


def test_scores_of_the_class_token_alone_change():
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 9, 8, generator=generator)
    call = AttentionCall(query, key, value)
    gains = torch.zeros(2, 9)
    gains[0, [2, 4]], gains[1, 8] = 0.7, 0.3
    scores = query.double().numpy() @ key.double().mT.numpy() / np.sqrt(8)
    row = scores[:, :, 0]
    row += gains.numpy()[:, None] * np.abs(row)
    expected = softmax(scores)
    changed = call._replace(key_weights=Informed(gains, call))
    np.testing.assert_allclose(attention_matrix(changed), expected, rtol=1e-4, atol=1e-5)
    found = attend(changed)
    np.testing.assert_allclose(found, expected @ value.double().numpy(), rtol=1e-4, atol=1e-5)
    plain = attend(call)
    assert torch.equal(found[:, :, 1:], plain[:, :, 1:])
    assert not torch.allclose(found[:, :, 0], plain[:, :, 0], atol=1e-2)


class Reader:
    def __init__(self):
        self.calls = []

    def enter(self, hidden):
        return hidden, self.read

    def read(self, call, hidden):
        self.calls.append(call)
        return call


@pytest.mark.parametrize("name", WITH_CLASS_TOKEN)
@torch.no_grad()
def test_informed_tokens_are_those_of_two_rows(name):
    model, images = MODELS[name](), make_images()
    before = Untouched(model)
    found = adapters.informed_tokens(model, images, 0.5)
    tower = vision_tower(model)
    rows = []
    for layer in (0, len(tower.blocks) - 2):
        reader = Reader()
        tower.blocks[layer].put(reader, changes_attention=True)
        encode(model, images)
        tower.blocks[layer].take(reader)
        (call,) = reader.calls
        rows.append(attention_matrix(call)[:, :, 0, tower.num_prefix_tokens :].sum(1).numpy())
    before.check()
    first, third = np.percentile(rows[1], [25, 75], axis=1, keepdims=True)
    summary = rows[1] > third + 1.5 * (third - first)
    count = rows[0].shape[1] // 2
    local = np.zeros_like(summary)
    np.put_along_axis(local, np.argsort(-rows[0])[:, :count], True, 1)
    assert found.summary.tolist() == summary.tolist()
    assert found.local.tolist() == (local & ~summary).tolist()


@torch.no_grad()
def test_tokens_are_set_for_the_images_that_come():
    model, images = make_clip(), make_images()
    before, plain = Untouched(model), model.encode_image(images)
    tokens = adapters.informed_tokens(model, images)
    with adapters.add_paying_attention(model) as handle:
        assert handle.layers == (2, 3, 4, 5)
        torch.testing.assert_close(model.encode_image(images), plain)
        handle.set_tokens(tokens)
        found = model.encode_image(images)
        with pytest.raises(ValueError, match="set for 4 images, but 3 came: call set_tokens"):
            model.encode_image(images[:3])
        handle.set_tokens(InformedTokens(*(each[1:2] for each in tokens)))
        torch.testing.assert_close(model.encode_image(images[1:2]), found[1:2])
    assert not torch.allclose(found, plain, atol=1e-3)
    with adapters.add_paying_attention(model, 0, 0) as handle:
        handle.set_tokens(tokens)
        torch.testing.assert_close(model.encode_image(images), plain, rtol=1e-4, atol=1e-5)
    before.check()


@torch.no_grad()
def test_what_is_refused():
    model, images = make_clip(), make_images()
    for name in ("SigLIP",):
        other = timm_models.MODELS[name]()
        for add in (
            adapters.add_paying_attention,
            partial(adapters.informed_tokens, images=images),
        ):
            with refused(other, TypeError, "a VisionTransformer, has no class token"):
                add(other)
    with refused(model, ValueError, "local_share must lie in"):
        adapters.informed_tokens(model, images, 1.5)
    tokens = adapters.informed_tokens(model, images)
    with (
        adapters.add_reweighting(model, [2], "attention") as reweighting,
        adapters.add_paying_attention(model) as handle,
    ):
        reweighting.set_class_embeddings(torch.randn(5, 16))
        handle.set_tokens(tokens)
        with pytest.raises(ValueError, match="cannot be changed beside weights of its keys"):
            model.encode_image(images)
