"""What a run shows while it decodes images."""

import io

import pytest
from open_clip.transform import PreprocessCfg
from rich.console import Console
from small_images import write_images

from tir_kernels.fewshot.data import load_data
from tir_kernels.fewshot.image_cache import ImageCache
from tir_kernels.fewshot.preprocess import Preprocess
from tir_kernels.fewshot.progress import RunDisplay


@pytest.mark.parametrize("is_terminal", [True, False])
def test_decoding_is_shown_beside_the_run_and_notices_above_it(tmp_path, is_terminal):
    data = load_data(write_images(tmp_path / "images", {"a": 4, "b": 3}))
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=100)
    display = RunDisplay(console, episodes=1, methods=("lora",), steps=2, finished=[])
    shown = []

    def decoding(*state):
        display.decoding(*state)
        display._bars.refresh()
        shown.append(console.file.getvalue())

    cache = ImageCache(
        tmp_path / "cache",
        data.source,
        Preprocess(PreprocessCfg(size=8)),
        notify=console.print,
        on_decode=decoding,
    )
    with display:
        for entry in data.classes:
            assert cache.read(entry, 0) is not None
        next(iter((tmp_path / "cache").iterdir())).write_bytes(b"")
        cache._classes.clear()
        for entry in data.classes:
            cache.read(entry, 0)
    text = console.file.getvalue()
    assert "damaged" in text
    assert ("decoding a" in text) == is_terminal
    assert ("3/4" in shown[2]) == is_terminal
    assert len(display._bars.tasks) == 2
