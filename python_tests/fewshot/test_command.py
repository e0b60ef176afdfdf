"""The command line as its users meet it: what it prints, leaves behind and answers."""

import dataclasses
import json
import platform
import sys
from pathlib import Path

import fake_engine
import pytest
import torch
from command_line import SMALL, assert_refused, results, with_value
from small_images import write_images

from tir_kernels.fewshot import command, fields
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.methods import METHODS, method_class
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.settings import Protocol, Runtime


def test_run_leaves_journal_summary_and_tables(arguments, tmp_path, capsys):
    methods = ["--method", "zero-shot", "--method", "tir", "--method", "tir"]
    assert fake_engine.run_main([*arguments, *methods]) == 0
    captured = capsys.readouterr()
    assert "Paired difference" in captured.out
    assert captured.out.count("zero-shot") == 2
    lines = captured.err.splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("6/6: episode 2, tir, ")
    assert "(so far zero-shot " in lines[-1]
    out = tmp_path / "out"
    assert [record.key for record in results(out)] == [
        (episode, method) for episode in range(3) for method in ("zero-shot", "tir")
    ]

    def refuse(name):
        raise AssertionError(name)

    summary = json.loads((out / "summary.json").read_text(), parse_constant=refuse)
    assert [entry["arm"] for entry in summary["arms"]] == ["zero-shot", "tir"]
    assert summary["differences"][0]["accuracy"]["episodes"] == 3
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings["arms"]["tir"]["lora_rank"] == 16
    assert list(settings["arms"]) == ["zero-shot", "tir"]
    for arm, options in settings["arms"].items():
        fields = {
            field.name
            for field in dataclasses.fields(method_class(arm))
            if not field.metadata.get("is_later")  # left out at its default
        }
        assert options.keys() == fields | {"method"}
    rest = {"ways", "shots", "queries", "seed", "device", "precision", "backend"}
    assert settings.keys() == rest | {"data", "model", "arms"}


def test_same_command_continues_and_may_add_episodes(arguments, tmp_path, capsys):
    assert fake_engine.run_main(arguments) == 0
    out = tmp_path / "out"
    whole = results(out)
    first_table = capsys.readouterr().out
    lines = (out / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (out / "episodes.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert fake_engine.run_main(arguments) == 0
    assert "torn" in capsys.readouterr().err
    assert results(out) == whole
    assert fake_engine.run_main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Accuracy" in captured.out
    assert "Accuracy" in first_table
    assert fake_engine.run_main(with_value(arguments, "--episodes", "4")) == 0
    assert results(out)[: len(whole)] == whole
    assert len(results(out)) == 8
    capsys.readouterr()
    assert_refused(capsys, arguments, "may grow but not shrink", program=fake_engine.run_main)


def test_changed_settings_are_refused(arguments, tmp_path, capsys):
    assert fake_engine.run_main(arguments) == 0
    capsys.readouterr()
    before = (tmp_path / "out" / "episodes.jsonl").read_bytes()

    def refused(changed, *parts):
        assert_refused(capsys, changed, *parts, program=fake_engine.run_main)

    refused(with_value(arguments, "--steps", "3"), "--steps was 2, is 3;")
    refused([*arguments, "--layers", "1,3"], "--layers was unset, is 1,3;")
    refused(
        [*arguments, "--seed", "1", "--lora-lr", "1"],
        "--seed was 0, is 1; --lora-lr was 0.0002, is 1.0;",
    )
    refused([*arguments, "--method", "tir"], "--method was tir,lora, is tir;")
    refused(with_value(arguments, "--model", "other"), "--model was content fake")
    Path(arguments[2], "ClassA", "000.png").unlink()
    refused(arguments, "--data was content ")
    assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == before


def test_non_finite_loss_is_reported_at_the_end(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_NAN", "class a")
    assert fake_engine.run_main([*arguments, "--seed", "2"]) == 2
    captured = capsys.readouterr()
    sick = [record for record in results(tmp_path / "out") if record.status != "ok"]
    assert sick
    assert {(record.arm, record.status) for record in sick} == {("lora", "non-finite loss")}
    assert all("ClassA" in record.classes for record in sick)
    assert "Paired difference" in captured.out
    assert "lora: non-finite loss in episode" in captured.err.splitlines()[-1]
    assert "lower --lora-lr" in captured.err.splitlines()[-1]
    assert len(results(tmp_path / "out")) == 6


def test_unreadable_images(arguments, tmp_path, capsys):
    bad = [Path(arguments[2], f"Class{c}", "003.png") for c in "ABCDEF"]
    for path in bad:
        path.write_bytes(b"damaged")
    refused = with_value(arguments, "--queries", "5")
    assert_refused(
        capsys, refused, "can't read the image ", "--skip-unreadable", program=fake_engine.run_main
    )
    assert fake_engine.run_main([*refused, "--skip-unreadable"]) == 0
    out = capsys.readouterr().out.replace("\n", "")
    named = [path for path in bad if f"{path.parent.name}/{path.name}" in out]
    assert named
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["skipped_images"]) == len(named)


def test_bad_data(arguments, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(capsys, with_value(arguments, "--data", str(empty)), "has no sub-folders")
    assert_refused(capsys, with_value(arguments, "--data", "/none"), "--data: /none does not exist")
    assert_refused(capsys, with_value(arguments, "--ways", "7"), "--ways 7 is more than the 6")
    assert_refused(
        capsys,
        with_value(arguments, "--queries", "7"),
        "class 'ClassA'",
        "has 8 images but 9 are needed (2 shots + 7 queries)",
    )
    assert_refused(capsys, [*arguments, "--class-names", "/none.json"], "can't read /none.json")
    assert not (tmp_path / "out").exists()


def test_bad_models(arguments, tmp_path, capsys, tiny_model_folder):
    assert_refused(capsys, with_value(arguments, "--model", "VIT-B16"), "nearest are ViT-B-16")
    assert_refused(capsys, with_value(arguments, "--model", "ViT-B-32"), "pass a tag (")
    weights = str(tiny_model_folder / "tiny_fp16.safetensors")
    assert_refused(
        capsys,
        [*with_value(arguments, "--model", "ViT-S-32-alt"), "--pretrained", weights],
        "are not of ViT-S-32-alt: ",
        " instead of ",
    )


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        (["--ways", "1"], ["--ways must be at least 2; got 1"]),
        (["--episodes", "0"], ["--episodes"]),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "0"], ["--steps must be at least 1; got 0"]),
        (["--layers", "8;10"], ["--layers", "8,10"]),
        (["--top-ratio", "1.5"], ["--top-ratio must lie in [0, 1]; got 1.5"]),
        (["--lora-dropout", "1"], ["--lora-dropout must lie in [0, 1)"]),
        (["--rule", "cubic"], ["--rule", "'linear', "]),
        (["--method", "magic"], ["--method", "'zero-shot'"]),
        (["--backend", "abacus"], ["--backend", "'auto', 'reference', "]),
        (["--device", "cuda:77"], ["--device cuda:77 can't be used here"]),
        (["--lora-rnak", "3"], ["No such option", "--lora-rank"]),
        (["--out", "/proc/none"], ["--out: can't write in /proc/none"]),
    ],
)
def test_bad_options(arguments, capsys, extra, parts):
    assert_refused(capsys, [*arguments, *extra], *parts)


def test_missing_options(capsys):
    assert_refused(capsys, ["run", "--model", "m", "--out", "o"], "--data")
    assert_refused(capsys, ["walk"], "walk")


def test_layers_that_the_model_does_not_have(arguments, capsys, tiny_model_folder):
    wrong = [*with_value(arguments, "--model", str(tiny_model_folder)), "--layers", "77"]
    assert_refused(capsys, wrong, "episode 0, tir: ", "77")


def test_every_setting_is_an_option():
    names = {parameter.name for parameter in command.run.params}
    kinds = (Protocol, Runtime, *map(method_class, METHODS))
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert fields <= names
    demo_names = {parameter.name for parameter in command.demo.params}
    assert fields <= demo_names
    for parameter in command.run.params:
        if parameter.name in fields:
            assert parameter.help, parameter.name


def test_options_reach_the_training(arguments, monkeypatch):
    seen = []

    def spy(*positional, **options):
        seen.append(positional[1])
        return fake_finetune(*positional, **options)

    fake_finetune = fake_engine.fake_finetune
    monkeypatch.setattr(fake_engine, "fake_finetune", spy)
    options = "--layers 2,4 --text-layer 1 --lora-lr 0.5 --logit-scale 3 --placement both"
    assert fake_engine.run_main([*arguments, *options.split(), "--method", "tir"]) == 0
    assert {
        (c.layers, c.text_layer, c.lora_lr, c.logit_scale, c.placement, c.steps) for c in seen
    } == {((2, 4), 1, 0.5, 3.0, "both", 2)}


def test_demo_compares_three_methods_on_drawn_images(tmp_path, capsys, monkeypatch):
    drawn = []

    def draw(root):
        drawn.append(root)
        write_images(root, {f"kind_{letter}": 20 for letter in "abcde"})
        (root / "class_names.json").write_text(
            json.dumps({f"kind_{letter}": f"the {letter} kind" for letter in "abcde"})
        )

    monkeypatch.setattr("tir_kernels.demo.write_image_folder", draw, raising=False)
    monkeypatch.setattr("tir_kernels.demo.model_directory", lambda: Path("model"), raising=False)
    arguments = ["demo", "--out", str(tmp_path / "out"), "--episodes", "2", "--steps", "1"]
    assert fake_engine.run_main(arguments) == 0
    assert drawn == [tmp_path / "out" / "images"]
    assert len(results(tmp_path / "out")) == 6
    assert "tir (T) − zero-shot (F)" in capsys.readouterr().out
    (tmp_path / "file").write_text("")

    def fail(root):
        raise NotADirectoryError(20, "Not a directory")

    monkeypatch.setattr("tir_kernels.demo.write_image_folder", fail)
    arguments[2] = str(tmp_path / "file")
    assert_refused(capsys, arguments, "--out: can't write images to ")


def test_help(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--skip-unreadable" in text
    assert all(method in text for method in METHODS)
    assert "None" not in text


@pytest.mark.parametrize("wrong", ["some", "0"])
def test_parallel_episodes_are_a_number_or_auto(arguments, capsys, wrong):
    assert_refused(capsys, with_value(arguments, "--parallel-episodes", wrong), "parallel-episodes")


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_supported", [True, False])
def test_a_precision_that_slows_a_cpu_down_is_told(
    arguments, capsys, monkeypatch, precision, is_supported
):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: is_supported, raising=False)
    assert fake_engine.run_main(with_value(arguments, "--precision", precision)) == 0
    is_told = f"products of {precision} numbers" in capsys.readouterr().err
    assert is_told == (precision != "float32" and not is_supported)


@pytest.mark.slow
def test_auto_and_checkpoints_leave_the_results_alone(make_images, tiny_model_folder, tmp_path):
    arguments = ["run", "--data", str(make_images()), "--model", str(tiny_model_folder)]
    arguments += [*SMALL.split(), "--layers=0", "--lora-dropout=0.25", "--out"]
    outs = [tmp_path / name for name in ("plain", "changed")]
    assert main([*arguments, str(outs[0])]) == 0
    changed = ["--parallel-episodes", "auto", "--checkpoint"]
    assert main([*arguments, str(outs[1]), *changed]) == 0
    plain, other = ({r.key: r for r in results(out)} for out in outs)
    assert plain.keys() == other.keys()
    for key, record in plain.items():
        assert other[key].correct == record.correct
        assert other[key].final_loss == pytest.approx(record.final_loss, abs=1e-4)


def test_arms_of_one_method_are_compared(arguments, tmp_path, capsys):
    arms = ["--arm", "late=tir,layers=2,3,steps=1", "--arm", "text=tip-adapter,alpha=0"]
    assert fake_engine.run_main([*arguments, "--method", "tir", *arms]) == 0
    captured = capsys.readouterr()
    assert "late (T) − text (F)" in captured.out
    assert "│ text[alpha=0, " in captured.out  # as the method wants it
    records = results(tmp_path / "out")
    assert {record.arm for record in records} == {"tir", "late", "text"}
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]["arms"]
    assert (settings["tir"]["steps"], settings["late"]["steps"]) == (2, 1)
    assert settings["late"]["layers"] == [2, 3]
    assert settings["text"] == {
        "method": "tip-adapter",
        "alpha": 0.0,
        "beta": 5.5,
        "logit_scale": 100.0,
    }
    assert fake_engine.run_main([*arguments, "--method", "tir", *arms]) == 0, "it continues"
    capsys.readouterr()
    arms[1] = "late=tir,layers=2,3,steps=3"
    assert fake_engine.run_main([*arguments, "--method", "tir", *arms]) == 2
    assert "--steps of late was 1, is 3;" in capsys.readouterr().err


def test_a_method_may_be_registered_late(arguments, tmp_path, monkeypatch):
    """It has no options on the command line, but its fields are those of an arm."""

    @dataclasses.dataclass(frozen=True)
    class Late(ZeroShot):
        name = "late"
        sharpness: int = fields.whole(1, "Sharpness.")

    monkeypatch.setitem(METHODS, "late", f"{__name__}:late_method")
    monkeypatch.setattr(sys.modules[__name__], "late_method", Late, raising=False)
    arms = ["--method", "late", "--arm", "sharp=late,sharpness=3"]
    assert fake_engine.run_main([word for word in arguments if "--steps" not in word] + arms) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]["arms"]
    assert (settings["late"]["sharpness"], settings["sharp"]["sharpness"]) == (1, 3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--arm", "late"], "--arm must look like NAME=METHOD,field=value; got 'late'"),
        (["--arm", "a=magic"], "--arm 'a': method must be one of tir, lora, zero-shot"),
        (["--arm", "a=tir,steps=0"], "--arm 'a': steps must be at least 1; got 0"),
        (["--method", "lora", "--top-ratio", "0.5"], "--top-ratio is no setting of lora; leave"),
        (["--method", "tir", "--arm", "tir=lora"], "names of their own; 'tir' is there twice"),
    ],
)
def test_bad_arms(arguments, capsys, extra, message):
    assert_refused(capsys, [*arguments, *extra], message)
