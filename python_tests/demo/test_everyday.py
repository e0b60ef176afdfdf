"""The source domain of the demonstration: drawings, and captions that are true of them."""

from __future__ import annotations

import numpy as np
import pytest

from tir_kernels.demo.captions import CHOICES, NUMBERS, Scene, describe
from tir_kernels.demo.drawings import SHAPES, SourceDrawing, draw_source
from tir_kernels.demo.everyday import COLOURS, TEXTURES

SOME = [draw_source(index, seed=11) for index in range(500)]
SINGLE = [drawing for drawing in SOME if drawing.scene.number == "one"]
GROUPS = [drawing for drawing in SOME if drawing.scene.number != "one"]


def mostly(judged: list[bool]) -> bool:
    """Whether all but a few of very many are true: tints and noise blur a border now and then."""
    return len(judged) > 50 and sum(judged) > 0.97 * len(judged)


def colour_seen(drawing: SourceDrawing) -> str:
    """The palette's colour that is nearest to the typical pixel of the objects."""
    typical = np.median(drawing.pixels[drawing.cover], axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(typical - COLOURS[name]).sum()))


@pytest.mark.parametrize("group", [None, False, True])
def test_drawings_depend_on_seed_stream_and_index_only(group: bool | None) -> None:
    first = [draw_source(index, seed=3, group=group) for index in range(12)]
    again = [draw_source(index, seed=3, group=group) for index in reversed(range(12))][::-1]
    for one, two in zip(first, again, strict=True):
        assert one.pixels.shape == (64, 64, 3)
        assert one.pixels.dtype == np.uint8
        assert np.array_equal(one.pixels, two.pixels)
        assert np.array_equal(one.cover, two.cover)
        assert (one.caption, one.scene) == (two.caption, two.scene)
        if group is not None:
            assert (one.scene.number != "one") == group
    assert not np.array_equal(first[0].pixels, first[1].pixels)
    assert not np.array_equal(first[0].pixels, draw_source(0, seed=4, group=group).pixels)
    other_stream = draw_source(0, seed=3, stream=1, group=group)
    assert not np.array_equal(first[0].pixels, other_stream.pixels)


def test_captions_name_what_is_drawn() -> None:
    assert {drawing.scene.shape for drawing in SOME} == set(SHAPES)
    plural = {"box": "boxes"}
    for drawing in SOME:
        scene, caption = drawing.scene, drawing.caption
        assert scene.shape in caption or plural[scene.shape] in caption
        for word in (scene.colour, scene.texture, scene.size, scene.position, scene.background):
            assert word in caption
        if scene.number != "one":
            assert caption.startswith(scene.number)
    assert len({drawing.caption for drawing in SOME}) > 450


def test_every_choice_is_drawn() -> None:
    for attribute, choices in CHOICES.items():
        assert set(choices) <= {getattr(drawing.scene, attribute) for drawing in SOME}
    assert set(CHOICES["colour"]) == set(COLOURS)
    assert set(CHOICES["texture"]) == set(TEXTURES)


def test_the_stated_number_is_on_the_canvas() -> None:
    for drawing in GROUPS:
        centres = 11.5 + 20.5 * np.arange(3)
        windows = [
            drawing.cover[int(y) - 6 : int(y) + 7, int(x) - 6 : int(x) + 7]
            for y in centres
            for x in centres
        ]
        seen = sum(window.mean() > 0.15 for window in windows)
        assert seen == 1 + NUMBERS.index(drawing.scene.number), drawing.caption


def test_the_stated_position_and_size_are_on_the_canvas() -> None:
    for drawing in SINGLE:
        rows, columns = np.nonzero(drawing.cover)
        right = (columns.min() + columns.max() - 63) / 2
        down = (rows.min() + rows.max() - 63) / 2
        far = {
            "left": -right, "right": right, "top": -down, "bottom": down,
            "middle": 15 - np.hypot(right, down),
        }  # fmt: skip
        assert far[drawing.scene.position] > 6, drawing.caption
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        bounds = {"small": (10, 24), "": (17, 36), "large": (30, 64)}[drawing.scene.size]
        assert bounds[0] <= extent <= bounds[1], (drawing.caption, extent)


def test_the_stated_colour_and_texture_are_on_the_canvas() -> None:
    plain = [drawing for drawing in SOME if drawing.scene.texture == "plain"]
    assert mostly([colour_seen(drawing) == drawing.scene.colour for drawing in plain])
    # A pattern swings between two tones; a plain object has shading, grain and an outline only.
    for drawing in SINGLE:
        inside = drawing.cover.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                inside &= np.roll(drawing.cover, step, axis)
        if inside.sum() > 60:
            deviation = drawing.pixels[inside].astype(float).std(axis=0).max()
            assert (deviation > 25) == (drawing.scene.texture != "plain"), drawing.caption


def test_the_grammar_leaves_out_what_is_not_asked_for() -> None:
    scene = Scene("fish", "orange", "spotted", "three", "", "", "water")
    assert describe(scene) == "three spotted orange fish on water"
    assert describe(scene, ("shape",)) == "three fish"
    assert describe(scene, ("number", "colour")) == "three orange things"
    assert describe(scene, ("texture", "background")) == "something spotted on water"
    single = Scene("arrow", "blue", "plain", "one", "left", "", "snow")
    assert describe(single) == "a plain blue arrow on the left, in the snow"
    assert describe(single, ("shape",)) == "an arrow"
    assert describe(single, ("position",)) == "something on the left"
