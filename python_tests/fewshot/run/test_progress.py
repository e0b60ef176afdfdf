"""The lines that a run shows beside its bars."""

import io

import pytest
from rich.console import Console

from tir_kernels.fewshot.run.progress import RunDisplay


@pytest.mark.parametrize("is_terminal", [True, False])
def test_notices_appear_above_the_bars(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
    display = RunDisplay(console, episodes=1, steps={"lora": 2}, finished=[])
    with display:
        display.step(0, "lora", 0, 0.5)
        console.print("--cache: something is damaged")
        display._bars.refresh()
    text = console.file.getvalue()
    assert "--cache: something is damaged\n" in text.replace("\r", "")
    assert ("1/2" in text.split("damaged")[1]) == is_terminal
