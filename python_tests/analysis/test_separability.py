"""Separability against scikit-learn, and its chance level against shuffled labels."""

import numpy as np
import pytest
import torch
from analysis.views import found, make_view

from tir_kernels.analysis.measures.separability import Separability, separability


def clusters(count=20, classes=4, distance=2.0, seed=0):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % classes)
    means = distance * random.standard_normal((classes, 12))
    return means[labels] + random.standard_normal((count, 12)), labels


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("distance", [0.0, 2.0])
def test_against_scikit_learn(seed, distance):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    features, labels = clusters(distance=distance, seed=seed)
    labels[:3] = 9  # classes of different sizes, with gaps in their numbers
    labels[3] = 7  # one image alone
    names = np.unique(labels)
    found = separability(torch.from_numpy(features), torch.from_numpy(labels))
    score = metrics.calinski_harabasz_score(features, labels)
    ratio = score * (len(names) - 1) / (len(labels) - len(names))
    assert found[0, 0].item() == pytest.approx(ratio)
    silhouette = metrics.silhouette_score(features, labels, metric="cosine")
    assert found[1, 0].item() == pytest.approx(silhouette)
    random = np.random.default_rng(5)
    shuffled = [random.permutation(labels) for _ in range(300)]
    by_chance = [metrics.silhouette_score(features, each, metric="cosine") for each in shuffled]
    assert found[1, 1].item() == pytest.approx(np.mean(by_chance), abs=0.05)
    by_chance = [metrics.calinski_harabasz_score(features, each) for each in shuffled]
    by_chance = np.mean(by_chance) * (len(names) - 1) / (len(labels) - len(names))
    assert found[0, 1].item() == pytest.approx(by_chance, rel=0.2)


def test_invariances():
    features, labels = (torch.from_numpy(part) for part in clusters())
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    expected = separability(features, labels)
    torch.testing.assert_close(separability(3 * features @ turn, labels), expected)
    torch.testing.assert_close(separability(features + 5, labels)[0], expected[0])
    names = torch.tensor([30, 10, 2, 40])
    torch.testing.assert_close(separability(features, names[labels])[:, 0], expected[:, 0])


def test_random_labels_are_at_chance_and_true_ones_are_not():
    unrelated = torch.stack(
        [
            separability(*map(torch.from_numpy, clusters(distance=0.0, seed=seed)))
            for seed in range(40)
        ]
    )
    torch.testing.assert_close(*unrelated.mean(0).unbind(1), atol=0.03, rtol=0)
    value, chance = separability(*map(torch.from_numpy, clusters())).unbind(1)
    assert (value > chance + 0.2).all()


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_of_a_view(prefix):
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    view = make_view(prefix, batch=6, labels=labels)
    findings = found(Separability(), view)
    kinds = {"mean patch": view.output[:, prefix:].mean(1)}
    if prefix:
        kinds["class token"] = view.output[:, 0]
    assert len(findings) == 2 * len(kinds)
    for source, features in kinds.items():
        expected = separability(features, labels)
        for kind, (value, chance) in zip(("scatter ratio", "silhouette"), expected, strict=True):
            finding = findings[f"{kind} of {source}"]
            torch.testing.assert_close(finding.values, value.float().expand(6))
            torch.testing.assert_close(finding.chance, chance.float().expand(6))


def test_groups_are_as_alone():
    labels = torch.tensor([0, 1, 0, 1, 2, 2, 2, 0])
    view = make_view(1, batch=8, labels=labels, class_embeddings=torch.randn(2, 3, 12))
    findings = found(Separability(), view)
    for own in (slice(0, 4), slice(4, 8)):
        alone = make_view(1, hidden=view.hidden[own], output=view.output[own], labels=labels[own])
        for name, finding in found(Separability(), alone).items():
            torch.testing.assert_close(findings[name].values[own], finding.values)
            torch.testing.assert_close(findings[name].chance[own], finding.chance)


@pytest.mark.parametrize(
    "labels", [[0, 0, 0, 0], [0, 1, 2, 3], [0]], ids=["one class", "one shot", "one image"]
)
def test_none_found(labels):
    view = make_view(1, batch=len(labels), labels=torch.tensor(labels))
    findings = found(Separability(), view)
    assert len(findings) == 4
    for finding in findings.values():
        assert finding.averages() == [(None, None)]


def test_features_without_scatter():
    ratio, silhouette = separability(torch.ones(6, 3), torch.arange(6) % 2)
    assert ratio.isnan().all()
    assert silhouette.eq(0).all()


def test_without_labels_nothing_is_found():
    assert not found(Separability(), make_view(1, labels=None))
