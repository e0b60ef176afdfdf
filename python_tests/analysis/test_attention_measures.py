"""Received mass, place of the top patch and entropy, against NumPy and SciPy."""

import numpy as np
import pytest
import scipy.stats
import torch
from analysis.views import PATCHES, attention, found, make_view

from tir_kernels.analysis.measures.attention_entropy import AttentionEntropy
from tir_kernels.analysis.measures.received_mass import ReceivedMass
from tir_kernels.analysis.measures.top_patch import TopPatch
from tir_kernels.analysis.statistics import statistics_of
from tir_kernels.towers.protocol import AttentionCall

PREFIXES = pytest.mark.parametrize("prefix", [0, 1, 5])


def uniform_view(prefix, patches=PATCHES):
    zeros = torch.zeros(2, 2, prefix + patches, 8)
    return make_view(prefix, batch=2, patches=patches, call=AttentionCall(zeros, zeros, zeros))


def view_of_received(received):
    """A view in which patch j of image b receives as ``received[b, j]`` says, from all alike."""
    received = torch.as_tensor(received, dtype=torch.float32)
    batch, length = received.shape
    query = torch.ones(batch, 1, length, 1)
    call = AttentionCall(query, received.log()[:, None, :, None], query, scale=1.0)
    return make_view(0, batch=batch, patches=length, call=call)


@PREFIXES
def test_mass_against_numpy(prefix):
    view = make_view(prefix)
    findings = found(ReceivedMass((1, 4)), view)
    matrix = attention(view)
    rows = {"from all tokens": matrix.mean(2)[..., prefix:]}
    if prefix:
        rows["from the class token"] = matrix[:, :, 0, prefix:]
    assert len(findings) == 4 * len(rows)
    for source, row in rows.items():
        for number, top in ((1, "top 1 patch"), (4, "top 4 patches")):
            mass = np.sort(row)[..., -number:].sum(2)
            finding = findings[f"mass of {top} {source}"]
            np.testing.assert_allclose(finding.values, mass.mean(1), atol=1e-6)
            assert finding.chance == number / (prefix + PATCHES)
            finding = findings[f"share of {top} {source}"]
            np.testing.assert_allclose(finding.values, (mass / row.sum(2)).mean(1), atol=1e-6)
            assert finding.chance == number / PATCHES


@PREFIXES
def test_uniform_attention_has_the_chance_levels(prefix):
    view = uniform_view(prefix)
    for measure in (ReceivedMass(), AttentionEntropy()):
        for finding in found(measure, view).values():
            torch.testing.assert_close(finding.values, torch.full((2,), finding.chance))


def test_mass_of_more_patches_than_there_are():
    findings = found(ReceivedMass((2, 3)), uniform_view(1, patches=2))
    assert findings["mass of top 3 patches from all tokens"].values.isnan().all()
    assert findings["share of top 2 patches from all tokens"].values.eq(1).all()


def test_patches_that_receive_nothing_have_no_share():
    view = uniform_view(1)
    weights = torch.zeros(2, 17)
    weights[:, 0] = 1
    view = make_view(1, batch=2, call=view.call._replace(key_weights=weights))
    findings = found(ReceivedMass(), view)
    assert findings["mass of top 1 patch from all tokens"].values.eq(0).all()
    assert findings["share of top 1 patch from all tokens"].values.isnan().all()
    findings = found(AttentionEntropy(), view)
    assert findings["entropy of class token over patches"].values.isnan().all()
    assert findings["entropy of patches"].values.eq(0).all()


@PREFIXES
def test_entropy_against_scipy(prefix):
    view = make_view(prefix)
    findings = found(AttentionEntropy(), view)
    matrix = attention(view)
    rows = scipy.stats.entropy(matrix[:, :, prefix:], axis=3) / np.log(prefix + PATCHES)
    np.testing.assert_allclose(findings["entropy of patches"].values, rows.mean((1, 2)), atol=1e-5)
    assert len(findings) == 1 + (prefix > 0)
    if prefix:
        row = scipy.stats.entropy(matrix[:, :, 0, prefix:], axis=2) / np.log(PATCHES)
        values = findings["entropy of class token over patches"].values
        np.testing.assert_allclose(values, row.mean(1), atol=1e-5)


def test_one_patch_has_no_entropy():
    findings = found(AttentionEntropy(), uniform_view(1, patches=1))
    assert findings["entropy of class token over patches"].values.isnan().all()
    assert findings["entropy of patches"].values.isclose(torch.ones(2)).all()
    assert (
        found(AttentionEntropy(), uniform_view(0, patches=1))["entropy of patches"]
        .values.isnan()
        .all()
    )


def test_places_of_the_top_patch():
    received = np.full((3, 16), 0.05)
    received[[0, 1, 2], [5, 4, 5]] = 0.25  # inside, left border, inside
    measure = TopPatch()
    findings = found(measure, view_of_received(received))
    border, first, others = findings.values()
    assert border.values.tolist() == [0, 1, 0]
    assert border.chance == 12 / 16
    assert first.values.tolist() == [1, 1, 1]
    assert others.values.tolist() == [0.5, 0, 0.5]
    assert first.chance == others.chance == 1 / 16
    received[0] = np.roll(received[0], 1)
    _, first, others = found(measure, view_of_received(received)).values()
    assert first.values.tolist() == [0, 1, 1]
    assert others.values.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="same images"):
        found(measure, view_of_received(received[:2]))


def test_groups_of_images_are_not_compared():
    received = np.full((4, 16), 0.05)
    received[[0, 1, 2, 3], [1, 1, 2, 3]] = 0.25
    view = view_of_received(received)
    view = make_view(0, patches=16, call=view.call, class_embeddings=torch.randn(2, 3, 12))
    *_, others = found(TopPatch(), view).values()
    assert others.values.tolist() == [1, 1, 0, 0]


def test_no_square_and_one_image():
    border, _, others = found(TopPatch(), view_of_received(np.full((1, 15), 1 / 15))).values()
    assert border.values.isnan().all()
    assert np.isnan(border.chance)
    assert others.values.isnan().all()
    assert found(TopPatch(), view_of_received([[0.9, 0.1]])).keys() == {
        "top patch is on the border", "top patch is where it was first",
        "top patch is where it is in other images",
    }  # fmt: skip


def test_top_patches_of_random_attention_lie_on_the_border_by_chance():
    random = np.random.default_rng(0).dirichlet(np.ones(49), 4000)
    border, _, others = found(TopPatch(), view_of_received(random)).values()
    assert abs(border.values.mean() - border.chance) < 4 * 0.5 / 4000**0.5
    assert abs(others.values.mean() - others.chance) < 0.002


@pytest.mark.parametrize("is_weighted", [False, True])
def test_statistics_of_causal_attention(is_weighted):
    query, key, value = torch.randn(3, 2, 3, 9, 8, generator=torch.Generator().manual_seed(4))
    weights = torch.linspace(0.5, 2, 18).view(2, 9) if is_weighted else None
    call = AttentionCall(query, key, value, key_weights=weights, is_causal=True)
    scores = (query.double() @ key.double().mT) * 8**-0.5
    terms = scores.exp().tril() * (1 if weights is None else weights.double()[:, None, None])
    matrix = terms / terms.sum(-1, keepdim=True)
    statistics = statistics_of(call, 2)
    expected = (
        matrix[:, :, :2].mean(2),
        matrix[:, :, 2:].mean(2),
        -matrix.xlogy(matrix).sum(-1),
        terms.sum(-1).log(),
    )
    for one, other in zip(statistics, expected, strict=True):
        torch.testing.assert_close(one, other.float())
    view = make_view(1, batch=2, patches=8, call=call)
    torch.testing.assert_close(view.class_token_row, matrix[:, :, 0].float())
