"""The command ``methods``: one line each where it is piped, broken lines in a terminal."""

import sys

import pytest
from command_line import assert_refused

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.methods import METHODS, method_class


def printed(capsys, *arguments):
    assert main(["methods", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_piped_each_method_is_a_line(capsys):
    *lines, empty, legend = printed(capsys).splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    for line in lines:
        name, label, *_ = line.split()
        method = method_class(name)
        assert label in "FTIS"
        assert line.endswith(f"({method.source})")
        assert (method.__doc__ or "").splitlines()[0].strip(".`") in line.replace("`", "")
    assert empty == ""
    assert "T: trained on the support images, through the towers" in legend


def test_options_stand_with_their_defaults(capsys):
    *lines, _, _ = printed(capsys, "--options").splitlines()
    assert len(lines) == len(METHODS)
    (line,) = [line for line in lines if line.startswith("tip-adapter ")]
    assert line.endswith("  alpha=1.0, beta=5.5, logit_scale=100.0, template=unset")


def test_a_method_is_shown_with_help_on_each_option(capsys):
    text = printed(capsys, "tir", "tip-adapter", "tir")
    assert text.count("tir: LoRA and a prompt context") == 1
    assert (
        "T: trained on the support images, through the towers. Source: arXiv 2605.25799.\n" in text
    )
    assert "  --placement tokens (tokens|attention|both" in text
    assert "  --alpha 1.0  Weight of the cache beside the text.\n" in text
    assert "``" not in text


def test_an_unknown_method_is_refused(capsys):
    assert_refused(capsys, ["methods", "tir", "x"], "METHOD must be one of tir, lora, ", "got 'x'")


@pytest.mark.parametrize("columns", [20, 50, 100])
def test_a_terminal_breaks_lines_between_words(capsys, monkeypatch, columns):
    class Terminal:
        def __init__(self, stream):
            self._stream = stream

        def isatty(self):
            return True

        def __getattr__(self, name):
            return getattr(self._stream, name)

    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["--options"], ["tir"]):
        text = printed(capsys, *arguments)
        lines = text.splitlines()
        longest = max(map(len, text.split()))
        assert max(map(len, lines)) <= max(columns, 30, longest + 10)
    if columns == 50:
        assert any(
            line.startswith(" " * 16) and "alpha=" in line
            for line in (printed(capsys, "--options").splitlines())
        )
