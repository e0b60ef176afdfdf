"""Methods that need what a model lacks say so before any episode is trained."""

from __future__ import annotations

import json

import pytest
import torch
from command_line import assert_refused
from fewshot.training_cases import draw_episode
from safetensors.torch import load_file, save_file
from small_images import write_images
from timm_models import make_alone

from tir_kernels import fewshot
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.methods import TIR, LinearProbe, LoRA
from tir_kernels.fewshot.run.journal import JournalReader

NAMES = {"red": 6, "light blue": 6, "green": 6}
SIZES = ["--ways=3", "--shots=2", "--queries=3", "--episodes=1", "--device=cpu"]


@pytest.fixture
def given(tmp_path, tiny_model_folder):
    images = write_images(tmp_path / "images", NAMES)

    def arguments(command, *options, model=tiny_model_folder):
        where = ["--data", str(images), "--model", str(model), "--out", str(tmp_path / "out")]
        sizes = SIZES if command == "run" else ["--device=cpu", "--folds=0"]
        return [command, *where, *sizes, *options]

    return arguments


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ("layers=1,7", "--layers must lie between 0 and 4; got 7"),
        ("text_layer=3", "--text-layer must lie between 0 and 2; got 3"),
    ],
)
def test_of_a_run_before_its_first_arm_is_trained(arm, words, given, tmp_path, capsys):
    arguments = given("run", "--method=lora", f"--arm=late=tir,{arm}")
    assert_refused(capsys, arguments, f"late: {words}")
    assert not (tmp_path / "out" / "episodes.jsonl").exists()


def test_of_a_fit_before_its_first_fold(given, tmp_path, capsys):
    arguments = given("fit", "--method=tir", "--text-layer=3", "--folds=2")
    assert_refused(capsys, arguments, "tir: --text-layer must lie between 0 and 2; got 3")
    assert not (tmp_path / "out" / "classifier.json").exists()
    with pytest.raises(FewShotError, match="tir: text_layer must lie between 0 and 2; got 3"):
        fewshot.fit(arguments[2], arguments[4], method=TIR(text_layer=3))


def test_a_tower_of_few_blocks_needs_its_layers_named(given, tmp_path, tiny_config, capsys):
    import open_clip

    tiny_config["model_cfg"]["vision_cfg"]["layers"] = 3
    folder = tmp_path / "shallow"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    save_file(open_clip.CLIP(**tiny_config["model_cfg"]).state_dict(), folder / "w.safetensors")
    words = "tir: --layers must be given for a tower of 3 blocks: the default is depth - 4"
    assert_refused(capsys, given("run", "--method=tir", model=folder), words)


@pytest.fixture
def without_position(tmp_path, tiny_config, tiny_model_folder):
    """A model whose text tower keeps every token."""
    folder = tmp_path / "keeps every token"
    folder.mkdir()
    tiny_config["model_cfg"]["text_cfg"]["pool_type"] = "none"
    tiny_config["model_cfg"]["custom_text"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(tiny_config))
    state = load_file(tiny_model_folder / "tiny_fp16.safetensors")
    save_file(state, folder / "tiny_fp16.safetensors")
    return folder


@pytest.mark.parametrize("method", ["lora", "zero-shot"])
def test_prompts_need_a_position_that_stands_for_the_text(method, given, without_position, capsys):
    words = (
        f"{method}: model's text pooling 'none' keeps every token",
        "pool_type first, last, argmax or eos",
    )
    methods = ["--method=linear-probe", f"--method={method}"]
    assert_refused(capsys, given("run", *methods, model=without_position), *words)


def test_methods_without_texts_take_such_a_model(given, without_position, tmp_path, capsys):
    arguments = given("run", "--method=linear-probe", model=without_position)
    assert main(arguments) == 0, capsys.readouterr().err
    assert len(JournalReader(tmp_path / "out").news()) == 1


def test_long_names_are_told_of_and_refused_where_cutting_makes_them_alike(given, tmp_path, capsys):
    long = "a very long description of one kind of tissue under the microscope, "
    words = {"red": f"{long} red", "light blue": "blue", "green": f"{long} green"}
    path = tmp_path / "names.json"
    path.write_text(json.dumps(words))
    arguments = given("run", "--method=lora", "--steps=1", f"--class-names={path}")
    alike = ("are the same prompt once cut to the model's text context of 16 tokens",)
    assert_refused(capsys, arguments, *alike, "--class-names")
    assert not (tmp_path / "out" / "episodes.jsonl").exists()
    path.write_text(json.dumps({**words, "green": "green"}))
    assert main(arguments) == 0
    told = capsys.readouterr().err
    assert "1 class name too long for the model's text context of 16 tokens, cut in prompts" in told
    assert "give shorter words with --class-names FILE" in told


def test_an_image_tower_alone_takes_methods_without_texts():
    model = make_alone("vit_small_patch14_reg4_dinov2")
    episode = draw_episode(0, ["cat", "dog", "cow"])
    for method in (TIR(), TIR(relevance="centroids"), LoRA()):
        with pytest.raises(TypeError, match="this needs texts; got VisionTransformer without any"):
            fewshot.finetune_episode(model, None, episode, method)
    result = fewshot.finetune_episode(model, None, episode, LinearProbe())
    assert result.query_logits.shape == (9, 3)
    assert torch.isfinite(result.query_logits).all()


def test_an_image_tower_alone_is_no_model_of_the_command_line(given, tmp_path, capsys):
    words = "is an image tower of the timm library alone, and classes are named by texts"
    name = "vit_small_patch14_reg4_dinov2"
    assert_refused(capsys, given("run", model=name), f"--model: {name} {words}", "linear-probe")
    folder = tmp_path / "timm"
    folder.mkdir()
    config = {"architecture": name, "num_classes": 0, "num_features": 384}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"cls_token": torch.zeros(1, 1, 384)}, folder / "model.safetensors")
    assert_refused(capsys, given("run", model=folder), f"{folder} {words}", "linear-probe")
