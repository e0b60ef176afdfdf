"""The sink ratio, against NumPy, on towers with and without adapters."""

import numpy as np
import pytest
import torch
from analysis.views import attention, encode, found, make_towers, make_view

from tir_kernels import adapters, analysis
from tir_kernels.analysis.measures.sink_ratio import SinkRatio
from tir_kernels.towers.protocol import AttentionCall


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_against_numpy(prefix, is_weighted):
    view = make_view(prefix, patches=20 - prefix)
    if is_weighted:
        weights = torch.rand(4, 20, generator=torch.Generator().manual_seed(1)) + 0.1
        view = make_view(prefix, patches=20 - prefix, call=view.call._replace(key_weights=weights))
    findings = found(SinkRatio(0.12, 2.5), view)
    received = attention(view).mean(2)
    groups = {"patches": slice(prefix, 20)}
    if prefix:
        groups["class token"] = slice(0, 1)
    if prefix == 5:
        groups["registers"] = slice(1, 5)
    assert len(findings) == 2 * len(groups)
    for label, epsilon in (("0.12", 0.12), ("2.5/L", 2.5 / 20)):
        for group, part in groups.items():
            ratio = (received[:, :, part].max(2) > epsilon).mean(1)
            finding = findings[f"sink ratio of {group}, ε = {label}"]
            assert finding.chance == 0.0
            np.testing.assert_allclose(finding.values, ratio, atol=1e-6)
            assert group != "patches" or 0 < ratio.mean() < 1, "the case shows nothing"


def test_uniform_attention_is_the_chance_level():
    zeros = torch.zeros(1, 1, 4, 8)
    call = AttentionCall(zeros, zeros, zeros)
    view = make_view(0, batch=1, patches=4, call=call)
    (absolute, relative) = SinkRatio(epsilon=0.2, times_chance=2).of_block(view)
    assert absolute.chance == absolute.values.item() == 1.0
    assert relative.chance == relative.values.item() == 0.0


@pytest.mark.parametrize("name", ["open_clip", "registers", "patches alone"])
@pytest.mark.parametrize("placement", ["tokens", "attention", "both"])
def test_on_towers(name, placement):
    model, width = make_towers()[name]
    images = torch.randn(2, 3, 32, 32)
    before = encode(model, images)
    plain = analysis.measure(model, images, [SinkRatio()])
    groups = {"open_clip": 2, "registers": 3, "patches alone": 1}[name]
    assert [each.block for each in plain] == [
        block for block in range(5) for _ in range(2 * groups)
    ]
    assert all(each.values.shape == (2,) for each in plain)
    with adapters.add_reweighting(model, [2], placement) as handle:
        handle.set_class_embeddings(torch.randn(3, width))
        weighted = encode(model, images)
        found = analysis.measure(model, images, [SinkRatio(times_chance=1.2)])
        assert torch.equal(encode(model, images), weighted), "a measure changes nothing"
        assert len(found) == len(plain)
    assert torch.equal(encode(model, images), before)
