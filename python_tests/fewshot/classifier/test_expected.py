"""Held-out folds keep the images of a subject together."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binomtest
from sklearn.model_selection import StratifiedGroupKFold

from tir_kernels.fewshot.classifier import expected
from tir_kernels.fewshot.classifier.figures import accuracy_figures
from tir_kernels.fewshot.classifier.fitting import FitSettings, Support


class Fitter:
    """Notes what is trained on and what is held out, and answers class 0."""

    keeper = None

    def __init__(self, folds):
        self.settings = FitSettings(folds=folds)
        self.parts = []

    def episode(self, kept, held_out):
        self.parts.append((kept, held_out))
        return held_out

    def train(self, part, held_out, on_step):
        logits = torch.zeros(len(held_out.labels), 2)
        logits[:, 0] = 1.0
        return SimpleNamespace(query_logits=logits)


@pytest.fixture
def support():
    """Two classes of twelve images; each subject has three, and one of them is in both classes."""
    labels = torch.arange(2).repeat_interleave(12)
    groups = [f"a{n // 3}" for n in range(12)] + ["a0"] * 3 + [f"b{n // 3}" for n in range(9)]
    return Support(torch.zeros(24, 3, 2, 2, dtype=torch.uint8), labels, "ab", (), tuple(groups))


@pytest.mark.parametrize("folds", [2, 4, 9])
def test_no_subject_is_on_both_sides(support, folds, monkeypatch):
    monkeypatch.setattr(expected, "_zero_shot", lambda *given: 0)
    fitter = Fitter(folds)
    found = expected.expected_accuracy(fitter, support)
    assert found["held_out_folds"] == len(fitter.parts) == min(folds, 4), "four subjects a class"
    assert found["held_out_images"] == 24
    assert found["held_out_accuracy"] == 0.5
    for kept, held_out in fitter.parts:
        assert not set(kept.groups) & set(held_out.groups)
        assert len(kept.labels) + len(held_out.labels) == 24
        assert len(kept.groups) == len(kept.labels)
    assert sorted(g for _, held_out in fitter.parts for g in held_out.groups) == sorted(
        support.groups
    )


def test_each_training_has_all_classes_where_patients_are_of_several():
    """With the first seed, one of two folds would hold out all images of a class."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    patients = ("b", "d", "b", "e", "a", "b")
    support = Support(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), labels, "ab", (), patients)
    split = StratifiedGroupKFold(2, shuffle=True, random_state=0).split(labels, labels, patients)
    assert min(len(set(labels[kept].tolist())) for kept, _ in split) == 1
    parts = list(expected.held_out_parts(Fitter(5), support))
    assert len(parts) == 2
    for kept, held_out in parts:
        assert set(kept.labels.tolist()) == {0, 1}
        assert not set(kept.groups) & set(held_out.groups)


def test_subjects_that_cannot_be_divided_allow_no_estimate(monkeypatch):
    """Whoever holds out one of the two patients holds out a whole class."""
    labels, patients = torch.tensor([0, 0, 1, 1, 2, 2]), ("p", "q", "p", "p", "q", "q")
    support = Support(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), labels, "abc", (), patients)
    monkeypatch.setattr(expected, "_zero_shot", lambda *given: 3)
    assert expected.number_of_folds(Fitter(5), support) == 0
    assert expected.expected_accuracy(Fitter(5), support) == {"zero_shot_accuracy": 0.5}


@pytest.mark.parametrize(("right", "count"), [(0, 7), (3, 7), (7, 7), (64, 90)])
def test_the_interval_is_scipys(right, count):
    low, high = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert expected.wilson_interval(right / count, count) == pytest.approx((low, high), abs=1e-12)


def test_the_interval_counts_subjects(support, monkeypatch):
    monkeypatch.setattr(expected, "_zero_shot", lambda *given: 0)
    found = expected.expected_accuracy(Fitter(2), support)
    assert found["held_out_subjects"] == 7
    assert (found["held_out_low"], found["held_out_high"]) == expected.wilson_interval(0.5, 7)
    (figure, _) = accuracy_figures(found)
    assert figure.meaning.endswith("; the interval is for 7 subjects")


def test_without_subjects_images_are_split(support, monkeypatch):
    monkeypatch.setattr(expected, "_zero_shot", lambda *given: 0)
    fitter = Fitter(9)
    expected.expected_accuracy(fitter, support._replace(groups=()))
    assert len(fitter.parts) == 9
