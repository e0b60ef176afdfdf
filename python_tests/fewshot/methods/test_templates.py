"""Templates of prompts, as an option of methods and of the command line."""

import json

import fake_engine
import numpy as np
import pytest
import torch
from command_line import with_value
from fewshot.training_cases import NAMES, draw_episode, make_model, make_tokenizer
from small_images import write_images

from tir_kernels.fewshot import finetune_episode
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.methods.lora import LoRA
from tir_kernels.fewshot.methods.tip_adapter import TipAdapter
from tir_kernels.fewshot.methods.zero_shot import ZeroShot

SEVERAL = ("a photo of {}.", "{}, seen from above.")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_a_class_is_the_mean_over_templates():
    model, tokenizer, episode = make_model(), make_tokenizer(), draw_episode(3, NAMES[1])
    with torch.no_grad():
        query = unit(model.encode_image(episode.query_images).double().numpy())
        texts = [
            unit(
                model.encode_text(
                    tokenizer([template.replace("{}", name) for name in episode.class_names])
                )
                .double()
                .numpy()
            )
            for template in SEVERAL
        ]
    found = finetune_episode(model, tokenizer, episode, ZeroShot(template=SEVERAL))
    expected = 4 * query @ unit(np.mean(texts, axis=0)).T
    np.testing.assert_allclose(found.query_logits.numpy(), expected, rtol=1e-3, atol=1e-3)
    # What is far from either template alone can't pass for their mean.
    assert np.abs(4 * query @ texts[0].T - expected).max() > 0.01
    adapted = finetune_episode(model, tokenizer, episode, TipAdapter(template=SEVERAL, alpha=0))
    np.testing.assert_allclose(adapted.query_logits.numpy(), 25 * expected, rtol=1e-3, atol=2e-2)


def test_the_default_is_no_setting():
    for method in (ZeroShot, TipAdapter, LoRA):
        assert "template" not in as_settings(method())
    model, tokenizer, episode = make_model(), make_tokenizer(), draw_episode(3, NAMES[1])
    plain, given = (
        finetune_episode(model, tokenizer, episode, method).query_logits
        for method in (ZeroShot(), ZeroShot(template=("a photo of a {}.",)))
    )
    assert torch.equal(plain, given)


def test_templates_that_are_refused():
    for wrong in ("a photo", "{} and {}", "a {name} {}", "a\n{}"):
        with pytest.raises(ValueError, match="template must"):
            ZeroShot(template=(wrong,))
    with pytest.raises(TypeError, match="template must be a list of str"):
        ZeroShot(template="a {}")
    with pytest.raises(ValueError, match="template must hold at least one"):
        ZeroShot(template=())
    with pytest.raises(ValueError, match="template must be one where prompts are trained; got 2"):
        LoRA(template=SEVERAL)


def test_arms_with_templates():
    texts = ["x=zero-shot,template=itap of a {}, my pet.|a {}.", "y=lora,template=one {}"]
    x, y = make_arms((), texts, {})
    assert x.method.template == ("itap of a {}, my pet.", "a {}.")
    assert y.method.template == ("one {}",)


def test_templates_of_a_run(tmp_path, arguments, capsys):
    root = write_images(tmp_path / "eurosat", dict.fromkeys(("Forest", "River", "SeaLake"), 6))
    arguments = [each for each in arguments if not each.startswith("--steps")]
    arguments = with_value([*arguments, "--method=zero-shot"], "--data", str(root))
    assert fake_engine.run_main([*arguments, "--template", "known", "--template", "a {}."]) == 0

    def templates(out):
        arms = json.loads((tmp_path / out / "settings.json").read_text())["settings"]["arms"]
        return arms["zero-shot"].get("template")

    assert templates("out") == ["a centered satellite photo of {}.", "a {}."]
    plain = with_value(arguments, "--out", str(tmp_path / "plain"))
    assert fake_engine.run_main(plain) == 0
    assert templates("plain") is None
    capsys.readouterr()
    assert fake_engine.run_main([*plain, "--template", "a {}."]) == 2
    assert "other settings: --template" in capsys.readouterr().err
    other = write_images(tmp_path / "other", dict.fromkeys("abc", 6))
    assert fake_engine.run_main(with_value([*plain, "--template=known"], "--data", str(other))) == 2
    assert "--template known: no template is known for the classes of" in capsys.readouterr().err
    assert fake_engine.run_main([*plain, "--template", "a photo"]) == 2
    assert "--template must hold one {}" in capsys.readouterr().err
