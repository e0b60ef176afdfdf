"""Templates of prompts, as an option of methods and of the command line."""

import json

import fake_engine
import numpy as np
import pytest
import torch
from command_line import with_value
from fewshot.training_cases import NAMES, draw_episode, make_model, make_tokenizer
from open_clip.tokenizer import SimpleTokenizer
from small_images import write_images

from tir_kernels.fewshot import finetune_episode
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.methods.lora import LoRA
from tir_kernels.fewshot.methods.tip_adapter import TipAdapter
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.run.folder import read_settings

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


@pytest.fixture
def clip_tokenizer(monkeypatch):
    """CLIP's tokenizer in place of the stand-in, with a context of 32 tokens."""
    monkeypatch.setattr(fake_engine, "fake_tokenizer", SimpleTokenizer(context_length=32))


def test_the_template_of_each_known_set(tmp_path, arguments, clip_tokenizer):
    plain = [*arguments, "--template=known", "--method=zero-shot", "--arm=x=lora,context_tokens=0"]
    sets = {
        "isic2018": (("MEL", "NV", "BCC"), "a skin lesion photo of a {}."),
        "chestx": (("Mass", "Nodule", "Effusion"), "a chest x-ray photo of a {}."),
        "plantvillage": (
            ("Apple___healthy", "Tomato___Leaf_Mold", "Potato___healthy"),
            "a crop disease photo of a {}.",
        ),
    }
    for name, (classes, template) in sets.items():
        root = write_images(tmp_path / name, dict.fromkeys(classes, 6))
        own = with_value(
            with_value(plain, "--data", str(root)), "--out", str(tmp_path / "o" / name)
        )
        assert fake_engine.run_main(own) == 0
        arms = read_settings(tmp_path / "o" / name)["settings"]["arms"]
        assert [arms[arm]["template"] for arm in ("zero-shot", "x")] == [[template]] * 2


def test_a_context_of_another_length_than_the_template(tmp_path, arguments, capsys, clip_tokenizer):
    root = write_images(tmp_path / "isic", dict.fromkeys(("MEL", "NV", "BCC"), 6))
    own = with_value([*arguments, "--template=known", "--method=lora"], "--data", str(root))
    assert fake_engine.run_main(own) == 2
    told = capsys.readouterr().err
    assert "--template 'a skin lesion photo of a {}.' has 7 tokens in front of {}" in told
    assert "has 4; set --context-tokens to 7" in told
    assert fake_engine.run_main([*own, "--context-tokens", "7"]) == 0


def test_cut_names_are_told_once(tmp_path, arguments, capsys, clip_tokenizer):
    end = " ".join(f"word{at}" for at in range(100))
    names = {f"Class{letter}": f"{letter} {end}" for letter in "ABCDE"} | {"ClassF": "cat"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    own = [*arguments, "--class-names", str(tmp_path / "names.json"), "--method=lora"]
    assert fake_engine.run_main(own) == 0
    told = capsys.readouterr().err
    assert told.count("5 class names too long for the model's text context of 32 tokens") == 1
    assert "'ClassA' to 'A word0" in told
    assert "give shorter words with --class-names FILE" in told
    names["ClassA"], names["ClassB"] = f"{end} A", f"{end} B"
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert fake_engine.run_main(with_value(own, "--out", str(tmp_path / "other"))) == 2
    told = capsys.readouterr().err
    assert "classes 'ClassA' and 'ClassB' have the words" in told
    # What is left differs without a prompt around it, and no more within one.
    start = " ".join(["cat"] * 22)
    names["ClassA"], names["ClassB"] = f"{start} dog big", f"{start} dog small"
    (tmp_path / "names.json").write_text(json.dumps(names))
    longer = ["--context-tokens", "8"]
    assert fake_engine.run_main([*with_value(own, "--out", str(tmp_path / "third")), *longer]) == 2
    told = capsys.readouterr().err
    assert "--class-names: 'cat cat" in told
    assert "are the same prompt once cut to" in told
    assert "shorten them with --class-names so" in told
