"""Held-out folds keep the images of a subject together."""

from types import SimpleNamespace

import pytest
import torch

from tir_kernels.fewshot.classifier import expected
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


def test_without_subjects_images_are_split(support, monkeypatch):
    monkeypatch.setattr(expected, "_zero_shot", lambda *given: 0)
    fitter = Fitter(9)
    expected.expected_accuracy(fitter, support._replace(groups=()))
    assert len(fitter.parts) == 9
