"""Norms and relevance by count, overlap and histogram of selections, against NumPy and SciPy."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from analysis.views import PATCHES, WIDTH, found, make_view

from tir_kernels import JointSpace
from tir_kernels.analysis.measures.count_histogram import CountHistogram
from tir_kernels.analysis.measures.norms_by_count import NormsByCount
from tir_kernels.analysis.measures.relevance_by_count import RelevanceByCount
from tir_kernels.analysis.measures.selection_overlap import SelectionOverlap

PREFIXES = pytest.mark.parametrize("prefix", [0, 1, 5])
ALL = [NormsByCount, RelevanceByCount, SelectionOverlap, CountHistogram]


def cosines(view):
    """(B, C, N) by NumPy."""
    patches = view.hidden[:, view.num_prefix_tokens :].double().numpy()
    classes = view.class_embeddings.double().numpy()
    patches, classes = (
        part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (patches, classes)
    )
    return np.einsum("bnd,cd->bcn", patches, classes)


def selections(view):
    """A set of patches for each image and class."""
    size = int(PATCHES * view.top_ratio)
    return [
        [set(np.argsort(-own)[:size].tolist()) for own in image] for image in cosines(view)
    ]  # fmt: skip


def counts(view):
    return np.array(
        [
            [sum(patch in own for own in image) for patch in range(PATCHES)]
            for image in selections(view)
        ]
    )


def mean_of(values, chosen):
    """Of each image, NaN where none is chosen."""
    return [
        own[is_in].mean() if is_in.any() else np.nan
        for own, is_in in zip(values, chosen, strict=True)
    ]


@PREFIXES
def test_norms_against_numpy(prefix):
    first, later = make_view(prefix), make_view(prefix, seed=1)
    later = make_view(prefix, seed=1, class_embeddings=first.class_embeddings)
    measure = NormsByCount()
    for view in (first, later):
        findings = found(measure, view)
        norms = np.linalg.norm(view.hidden.double().numpy()[:, prefix:], axis=2)
        assert len(findings) == 2 * 4
        for age, own in (("first", counts(first)), ("present", counts(view))):
            for count in range(4):
                finding = findings[f"norm at {age} count {count}"]
                expected = mean_of(norms, own == count)
                np.testing.assert_allclose(finding.values, expected, rtol=1e-5)
                np.testing.assert_allclose(finding.chance, norms.mean(1), rtol=1e-5)
    assert (counts(first) != counts(later)).any()


@PREFIXES
def test_relevance_against_numpy(prefix):
    first = make_view(prefix, top_ratio=0.5)
    later = make_view(prefix, 1, top_ratio=0.5, class_embeddings=first.class_embeddings)
    measure = RelevanceByCount()
    for view in (first, later):
        findings, cosine = found(measure, view), cosines(view)
        closest = cosine.max(1)
        own = cosine[np.arange(4), view.labels]
        margin = own - (cosine.sum(1) - own) / 2
        assert len(findings) == 8
        for age, number in (("first", counts(first)), ("present", counts(view))):
            for kind, count in (("simple", 3), ("hard", 1)):
                finding = findings[f"closest class of {age} {kind} patches"]
                np.testing.assert_allclose(
                    finding.values, mean_of(closest, number == count), atol=1e-5
                )
                np.testing.assert_allclose(finding.chance, closest.mean(1), atol=1e-5)
                finding = findings[f"margin of {age} {kind} patches"]
                np.testing.assert_allclose(
                    finding.values, mean_of(margin, number == count), atol=1e-5
                )
                assert finding.chance == 0


@PREFIXES
def test_overlap_against_numpy(prefix):
    view = make_view(prefix, classes=5)
    (finding,) = found(SelectionOverlap(), view).values()
    expected = [
        np.mean([len(a & b) / len(a | b) for a, b in itertools.combinations(image, 2)])
        for image in selections(view)
    ]
    np.testing.assert_allclose(finding.values, expected, rtol=1e-5)
    assert finding.chance == pytest.approx((4 / 16) / (2 - 4 / 16))


@PREFIXES
def test_histogram_against_numpy(prefix):
    view = make_view(prefix, classes=5)
    findings = found(CountHistogram(), view)
    assert len(findings) == 6
    for count, finding in enumerate(findings.values()):
        assert finding.name.endswith(f"count {count}")
        np.testing.assert_allclose(finding.values, (counts(view) == count).mean(1))
        assert finding.chance == pytest.approx(scipy.stats.binom.pmf(count, 5, 4 / 16))


def test_unrelated_classes_have_the_chance_levels():
    """Tokens and classes in so many dimensions that classes select independently."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 101, 500, generator=generator)
    classes = torch.linalg.qr(torch.randn(500, 5, generator=generator)).Q.T
    view = make_view(
        1, batch=30, patches=100, hidden=hidden, output=hidden, class_embeddings=classes
    )
    (overlap,) = found(SelectionOverlap(), view).values()
    assert overlap.values.mean().item() == pytest.approx(overlap.chance, abs=0.01)
    for finding in found(CountHistogram(), view).values():
        assert finding.values.mean().item() == pytest.approx(finding.chance, abs=0.02)
    for finding in found(NormsByCount(), view).values():
        (average,) = finding.averages()
        assert average.value == pytest.approx(average.chance, rel=0.01)


def test_equal_classes_select_the_same():
    classes = torch.randn(1, WIDTH).expand(4, -1)
    view = make_view(1, class_embeddings=classes)
    (overlap,) = found(SelectionOverlap(), view).values()
    assert overlap.values.eq(1).all()
    shares = [each.values[0].item() for each in found(CountHistogram(), view).values()]
    assert shares == [12 / 16, 0, 0, 0, 4 / 16]
    findings = found(RelevanceByCount(), view)
    assert findings["closest class of first hard patches"].values.isnan().all(), "none found"
    torch.testing.assert_close(
        findings["margin of first simple patches"].values, torch.zeros(4), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("kind", ALL)
def test_groups_are_as_alone(kind):
    classes = torch.randn(2, 3, WIDTH)
    view = make_view(1, class_embeddings=classes)
    measure, findings = kind(), found(kind(), view)
    for group, own in enumerate((slice(0, 2), slice(2, 4))):
        alone = make_view(
            1, hidden=view.hidden[own], class_embeddings=classes[group], labels=view.labels[own]
        )
        for name, finding in found(kind(), alone).items():
            torch.testing.assert_close(findings[name].values[own], finding.values, equal_nan=True)
            if isinstance(finding.chance, torch.Tensor):
                torch.testing.assert_close(findings[name].chance[own], finding.chance)
    found(measure, view)


@pytest.mark.parametrize("kind", ALL)
def test_without_classes_nothing_is_found(kind):
    assert not found(kind(), make_view(1, class_embeddings=None))


def test_one_class():
    view = make_view(1, classes=1)
    (overlap,) = found(SelectionOverlap(), view).values()
    assert overlap.values.isnan().all()
    findings = found(RelevanceByCount(), view)
    simple, hard = (
        findings[f"closest class of first {kind} patches"] for kind in ("simple", "hard")
    )
    assert torch.equal(simple.values, hard.values)
    assert not any(name.startswith("margin") for name in findings)
    assert not any(
        "margin" in name for name in found(RelevanceByCount(), make_view(1, labels=None))
    )


def test_classes_that_select_nothing():
    view = make_view(1, top_ratio=0.05)
    (overlap,) = found(SelectionOverlap(), view).values()
    assert overlap.values.isnan().all()
    histogram = found(CountHistogram(), view)
    assert histogram["share of patches with count 0"].values.eq(1).all()
    assert histogram["share of patches with count 0"].chance == 1


def test_joint_space_is_applied():
    space = JointSpace(torch.rand(WIDTH), torch.rand(WIDTH), 1e-5, torch.randn(WIDTH, 7))
    classes = torch.randn(3, 7)
    view = make_view(1, class_embeddings=classes, joint_space=space)
    mapped = torch.nn.functional.layer_norm(
        view.hidden, (WIDTH,), space.norm_weight, space.norm_bias
    )
    plain = make_view(1, hidden=mapped @ space.proj, class_embeddings=classes)
    for kind in (RelevanceByCount, SelectionOverlap, CountHistogram):
        for name, finding in found(kind(), view).items():
            torch.testing.assert_close(
                finding.values, found(kind(), plain)[name].values, equal_nan=True
            )
