"""The sink ratio, against NumPy, on towers with and without adapters."""

import numpy as np
import open_clip
import pytest
import timm
import torch

from tir_kernels import adapters, analysis
from tir_kernels.analysis.measures import BlockView
from tir_kernels.analysis.measures.sink_ratio import SinkRatio
from tir_kernels.towers.protocol import AttentionCall


def softmax(scores):
    terms = np.exp(scores - scores.max(-1, keepdims=True))
    return terms / terms.sum(-1, keepdims=True)


def sinks(view_call, prefix, epsilon):
    """Five lines of NumPy: share of heads in which a patch receives more than epsilon."""
    q, k, w = (view_call[name].astype(np.float64) for name in ("query", "key", "weights"))
    attention = softmax(q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5 + np.log(w)[:, None, None])
    received = attention.mean(2)
    return (received[:, :, prefix:].max(2) > epsilon).mean(1), (received[:, :, 0] > epsilon).mean(1)


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_against_numpy(prefix, is_weighted):
    random = np.random.default_rng(prefix)
    call = {
        "query": random.standard_normal((3, 4, 20, 8)).astype(np.float32),
        "key": 3 * random.standard_normal((3, 4, 20, 8)).astype(np.float32),
        "weights": random.uniform(0.1, 2, (3, 20)).astype(np.float32),
    }
    if not is_weighted:
        call["weights"][:] = 1
    tensors = {name: torch.from_numpy(values) for name, values in call.items()}
    weights = tensors["weights"] if is_weighted else None
    opened = AttentionCall(
        tensors["query"], tensors["key"], torch.zeros(3, 4, 20, 8), key_weights=weights
    )
    view = BlockView(2, torch.zeros(3, 20, 32), opened, prefix)
    findings = {each.name: each for each in SinkRatio(0.12, 2.5).of_block(view)}
    for label, epsilon in (("0.12", 0.12), ("2.5/L", 2.5 / 20)):
        patches, class_token = sinks(call, prefix, epsilon)
        found = findings[f"sink ratio of patches, ε = {label}"]
        assert found.block == 2
        assert found.chance == 0.0
        assert 0 < patches.mean() < 1, "the case shows nothing"
        np.testing.assert_allclose(found.values, patches, atol=1e-6)
        found = findings[f"sink ratio of class token, ε = {label}"]
        np.testing.assert_allclose(found.values, class_token, atol=1e-6)


def test_uniform_attention_is_the_chance_level():
    zeros = torch.zeros(1, 1, 4, 8)
    view = BlockView(0, torch.zeros(1, 4, 8), AttentionCall(zeros, zeros, zeros), 0)
    (absolute, relative) = SinkRatio(epsilon=0.2, times_chance=2).of_block(view)
    assert absolute.chance == absolute.values.item() == 1.0
    assert relative.chance == relative.values.item() == 0.0


def make_towers():
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 5, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2}
    return {
        "open_clip": (open_clip.CLIP(16, vision, text).eval(), 16),
        "registers": (
            timm.models.VisionTransformer(**sizes, reg_tokens=4, num_classes=0).eval(),
            32,
        ),
    }


@pytest.mark.parametrize("name", ["open_clip", "registers"])
@pytest.mark.parametrize("placement", ["tokens", "attention", "both"])
def test_on_towers(name, placement):
    model, width = make_towers()[name]
    images = torch.randn(2, 3, 32, 32)
    encode = model.encode_image if name == "open_clip" else model
    before = encode(images)
    plain = analysis.measure(model, images, [SinkRatio()])
    assert [each.block for each in plain] == [block for block in range(5) for _ in range(4)]
    assert all(each.values.shape == (2,) for each in plain)
    with adapters.add_reweighting(model, [2], placement) as handle:
        handle.set_class_embeddings(torch.randn(3, width))
        weighted = encode(images)
        found = analysis.measure(model, images, [SinkRatio(times_chance=1.2)])
        assert torch.equal(encode(images), weighted), "a measure changes nothing"
        assert len(found) == len(plain)
    assert torch.equal(encode(images), before)
