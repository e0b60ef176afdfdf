"""Command lines of small runs on the stand-in, and what they leave."""

import dataclasses
from pathlib import Path

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.journal import JournalReader

SMALL = "--ways=3 --shots=2 --queries=4 --episodes=3 --steps=2 --backend=reference --device=cpu"


def with_value(arguments, option, value):
    """The arguments with another value for an option: the last one counts."""
    return [*arguments, option, value]


def assert_refused(capsys, arguments, *parts, program=main):
    assert program(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("tir-finetune: error: ")
    for part in parts:
        assert part in lines[0]


def results(folder):
    return [
        dataclasses.replace(record, seconds=0, seconds_per_step=None)
        for record in JournalReader(Path(folder)).news()
    ]
