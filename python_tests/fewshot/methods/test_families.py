"""The families of methods, and how arms are shown by them."""

from dataclasses import dataclass

import pytest

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods import METHODS, method_class
from tir_kernels.fewshot.methods.families import FAMILIES, label_of, legend
from tir_kernels.fewshot.methods.protocol import Method
from tir_kernels.fewshot.run.shown_arms import shown_arms


def test_each_family_has_a_letter_of_its_own():
    assert [family.label for family in FAMILIES.values()] == ["F", "T", "I", "S", "Q"]


@pytest.mark.parametrize("family", ["feature only", "", None])
def test_another_family_is_refused(family):
    with pytest.raises(TypeError, match=r"Mine\.family must be one of frozen features, tuned to"):
        type("Mine", (Method,), {"name": "mine", "family": family})
    with pytest.raises(TypeError, match=r"Mine\.family must be .*; got None"):
        type("Mine", (Method,), {"name": "mine"})


def test_a_legend_explains_the_letters_that_are_there():
    assert (
        legend("TF")
        == "F: frozen features only; T: trained on the support images, through the towers."
    )
    assert legend("?") == "?: a method that is not known here."
    assert legend("") == ""
    assert "support images alone here" in legend("S")
    published = legend("TS", are_published=True)
    assert published.startswith(
        "T: trained on the support images, through the towers; S: trained on a labelled"
    )


def test_shown_fields_stand_behind_the_name_and_others_where_they_differ():
    settings = {
        "arms": {
            "tip": {"method": "tip-adapter", "alpha": 2.0, "logit_scale": 50.0},
            "tip-adapter": {"method": "tip-adapter"},
            "late": {"method": "tir", "layers": [9, 10], "strength": 0.5, "steps": 100},
            "other": {"method": "of-elsewhere", "x": 1},
        }
    }
    tip, plain, late, other = shown_arms(settings, list(settings["arms"])).values()
    assert (tip.name, tip.label) == ("tip[alpha=2, beta=5.5]", "F")
    assert tip.changed == ("logit_scale=50",)
    assert plain.name == "tip-adapter[alpha=1, beta=5.5]"
    assert plain.changed == ()
    assert (late.name, late.labelled, late.changed) == ("late", "late (T)", ("layers=9,10",))
    assert (other.name, other.label, other.changed) == ("other", "?", ())


def test_runs_from_before_there_were_arms_have_methods():
    (lora,) = shown_arms({"method": ["lora"], "steps": 3}, ["lora"]).values()
    assert (lora.method, lora.label, lora.options, lora.changed) == ("lora", "T", (), ())


def test_a_method_of_ones_own_says_what_is_shown(monkeypatch):
    @dataclass(frozen=True)
    class Mine(Method):
        """Mine."""

        name = "mine"
        source = "here"
        family = "inference only"
        shown_fields = ("strength", "words")
        strength: float = fields.real(1e-5, "Strength.")
        words: tuple[str, ...] | None = fields.text_list(None, "Words.", lambda name, each: each)

    monkeypatch.setitem(METHODS, "mine", "families_of_tests:Mine")
    monkeypatch.setattr("tir_kernels.registry.load", lambda place: Mine)
    assert label_of(method_class("mine")) == "I"
    settings = {"arms": {"mine": {"method": "mine", "words": ["a", "b"]}}}
    assert shown_arms(settings, ["mine"])["mine"].name == "mine[strength=1e-05, words=a,b]"
