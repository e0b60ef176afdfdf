"""Presets: what they set, what overrides them, and what is kept of them."""

import pytest
from fewshot import fake_engine
from fewshot.command_line import with_value

from tir_kernels.fewshot.arms import fields_of, make_arms
from tir_kernels.fewshot.methods import METHODS, TIR, LoRA, Mind, method_class
from tir_kernels.fewshot.presets import settings_of
from tir_kernels.fewshot.run.folder import read_settings

PAPER = {
    "lora_towers": "vision",
    "context_tokens": 0,
    "logit_scale": 100.0,
    "lora_schedule": "cosine/8",
}


def arms_of(*texts, methods=(), shared=None, preset=None):
    return {arm.name: arm.method for arm in make_arms(methods, texts, shared or {}, preset)}


@pytest.mark.parametrize("method", METHODS)
def test_settings_exist_and_are_allowed(method):
    kind = method_class(method)
    for name in vars(kind).get("presets", {}):
        settings = settings_of(name, kind)
        assert settings.keys() <= fields_of(kind).keys()
        kind(**settings)


def test_a_method_has_no_presets_of_its_bases():
    assert settings_of("paper", LoRA)
    assert not settings_of("paper", Mind)


def test_program_is_the_default():
    found = arms_of(methods=("lora", "tir"), preset="program")
    assert found == {"lora": LoRA(), "tir": TIR()}


def test_paper():
    found = arms_of(methods=("lora", "tir", "zero-shot"), preset="paper")
    assert found["lora"] == LoRA(steps=250, **PAPER)
    assert found["tir"] == TIR(steps=100, **PAPER)
    assert found["zero-shot"] == method_class("zero-shot")()


def test_what_is_said_goes_before_the_preset():
    texts = ("mine=tir,preset=paper,steps=7", "other=tir,preset=program", "plain=lora")
    found = arms_of(*texts, shared={"lora_rank": 4, "logit_scale": 9.0}, preset="paper")
    assert found["mine"] == TIR(steps=7, lora_rank=4, **(PAPER | {"logit_scale": 9.0}))
    assert found["other"] == TIR(lora_rank=4, logit_scale=9.0)
    assert found["plain"] == LoRA(steps=250, lora_rank=4, **(PAPER | {"logit_scale": 9.0}))


def test_refused():
    with pytest.raises(
        ValueError, match="preset must be one of paper, program, clip-lora; got 'papers'"
    ):
        arms_of("x=tir,preset=papers")
    with pytest.raises(ValueError, match="arm 'x': preset paper says nothing of zero-shot"):
        arms_of("x=zero-shot,preset=paper")


def test_a_run_takes_keeps_and_tells_a_preset(arguments, tmp_path, capsys):
    without = [each for each in arguments if not each.startswith("--steps")]
    own = [*without, "--method=tir", "--arm=x=lora,preset=program", "--preset=paper", "--steps=2"]
    assert fake_engine.run_main(own) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "--preset paper: tir has steps=2, lora_towers=vision, context_tokens=0" in told
    assert "--augment five" in told
    kept = read_settings(tmp_path / "out")["settings"]
    assert (kept["augment"], kept["resize"]) == ("five", "squash-bilinear")
    assert kept["arms"]["tir"] | PAPER | {"steps": 2} == kept["arms"]["tir"]
    assert "lora_towers" not in kept["arms"]["x"]
    # What is said beside it goes first.
    other = with_value([*own, "--augment=0"], "--out", str(tmp_path / "other"))
    assert fake_engine.run_main(other) == 0
    assert "augment" not in read_settings(tmp_path / "other")["settings"]
