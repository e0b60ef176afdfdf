"""What a fit shows while it goes, and class names and types that are not usual."""

import io
import json
import os

import pytest
import torch
from rich.console import Console
from small_images import write_images

from tir_kernels import fewshot
from tir_kernels.fewshot.classifier import prepared_fit
from tir_kernels.fewshot.classifier.fit_display import FitDisplay
from tir_kernels.fewshot.command import main


@pytest.mark.parametrize("is_terminal", [True, False])
def test_bars_and_lines(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
    display = FitDisplay(console, folds=2, steps=3)
    with display:
        display.step(1, 1, 0.5)
        display._bars.refresh()
        display.finished(1, 3, 4)
        display.step_of_all(0, 0.25)
        display._bars.refresh()
        display.finished_all(9)
    text = console.file.getvalue()
    assert "2/3: fold 2 of 2 held out, 3 of its 4 images right" in text
    assert "3/3: trained on all 9 images" in text
    assert ("fold 2 of 2, loss 0.500" in text) == is_terminal
    assert ("all images, loss 0.250" in text) == is_terminal


def fit(data, out, model, *more):
    options = ["fit", "--data", str(data), "--model", str(model), "--device=cpu", "--no-cache"]
    return main([*options, "--out", str(out), *more])


def test_hostile_class_names(tmp_path, tiny_model_folder, capsys):
    names = ["<b>bold<", "a|b", "[link](x)", "bell \x07", os.fsdecode(b"for\xeat")]
    data = tmp_path / "images"
    try:
        write_images(data, dict.fromkeys(names, 2))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (tmp_path / "words.json").write_text(
        json.dumps({name: f"kind {number}" for number, name in enumerate(names)})
    )
    words = ["--class-names", str(tmp_path / "words.json"), "--folds=0", "--method=tip-adapter"]
    assert fit(data, tmp_path / "out", tiny_model_folder, *words) == 0
    printed = capsys.readouterr()
    assert "\x07" not in printed.out + printed.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| &lt;b&gt;bold&lt; |" in card
    assert r"| a\|b |" in card
    assert r"| \[link\](x) |" in card
    assert r"| bell \\x07 |" in card
    assert r"| for\\xeat |" in card
    classifier = fewshot.load_classifier(tmp_path / "out")
    assert set(classifier.labels) == {*names[:-1], r"for\xeat"}
    assert fit(data, tmp_path / "out", tiny_model_folder, *words) == 0
    assert "is finished, with these settings" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_precision_is_the_classifiers_own(tmp_path, tiny_model_folder, precision):
    data = write_images(tmp_path / "images", {"ClassA": 2, "ClassB": 2})
    more = ["--steps=2", "--folds=0", f"--precision={precision}"]
    assert fit(data, tmp_path / "out", tiny_model_folder, *more) == 0
    about = fewshot.load_classifier(tmp_path / "out").about
    assert about.precision == precision
    assert f"- precision: {precision}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_interrupted_while_it_is_saved_and_damaged_later(
    tmp_path, tiny_model_folder, capsys, monkeypatch
):
    data, out = write_images(tmp_path / "images", {"ClassA": 2, "ClassB": 3}), tmp_path / "out"
    more = ["--steps=2", "--folds=2"]
    steps = []
    note = FitDisplay._step
    monkeypatch.setattr(
        FitDisplay, "_step", lambda self, *step: (steps.append(step), note(self, *step))
    )

    def begin(classifier, path):
        (path / "learned.safetensors").write_bytes(b"a beginning")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepared_fit, "save_classifier", begin)
        assert fit(data, out, tiny_model_folder, *more) == 130
    assert len(steps) == 3 * 2
    assert fit(data, out, tiny_model_folder, *more) == 0
    assert len(steps) == 3 * 2, "all trainings were finished"
    made = fewshot.load_classifier(out)
    # Cloned, since what was read is a map of the file that is overwritten below.
    learned = {name: each.clone() for name, each in made.learned.items()}
    assert sorted(path.name for path in (out / ".fit").iterdir()) == [
        ".lock",
        "parts.json",
        "settings.json",
    ]
    (out / "learned.safetensors").write_bytes(b"not as it was written")
    capsys.readouterr()
    assert fit(data, out, tiny_model_folder, *more) == 0
    printed = capsys.readouterr()
    assert "learned.safetensors is not as it was written" in printed.err
    assert "it is made anew" in printed.err
    assert "is finished" not in printed.out
    assert len(steps) == 4 * 2, "the folds are kept"
    again = fewshot.load_classifier(out)
    assert again.about == made.about
    assert all(torch.equal(each, learned[name]) for name, each in again.learned.items())
