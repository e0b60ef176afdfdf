"""Curves from tracked rows: which numbers are averaged, and over what."""

import numpy as np
import pytest
from made_runs import write_run

from tir_kernels.analysis.figures import INK
from tir_kernels.analysis.page.curves import by_block, by_step, change_table, quantities
from tir_kernels.analysis.page.gallery import gallery
from tir_kernels.analysis.page.similarity import similarity_panels
from tir_kernels.analysis.similarity import linear_cka
from tir_kernels.fewshot.run.maps import read_maps
from tir_kernels.fewshot.run.tracked import Tracked

STYLES = {"lora": 0, "tir": 1}
# Arm -> episode -> step -> values of blocks 0 and 1; None: none found.
VALUES = {
    "lora": {0: {0: (1.0, 3.0), 10: (5.0, 7.0)}, 1: {0: (2.0, None), 10: (4.0, None)}},
    "tir": {0: {0: (1.0, 3.0), 10: (2.0, 4.0)}, 1: {0: (2.0, None), 10: (None, None)}},
}


def rows(chance=0.5):
    return [
        Tracked(episode, arm, step, block, "m", "x", value, chance * (block + 1))
        for arm, episodes in VALUES.items()
        for episode, steps in episodes.items()
        for step, values in steps.items()
        for block, value in enumerate(values)
    ]


@pytest.fixture
def quantity():
    (only,) = quantities(rows())
    return only


def test_lines_through_training_are_means_over_blocks_then_episodes(quantity):
    panel = by_step(quantity, STYLES)
    lora, tir = panel.lines
    assert [(x, value.mean, value.episodes) for x, value in lora.points] == [(0, 2, 2), (10, 5, 2)]
    assert [(x, value.mean, value.episodes) for x, value in tir.points] == [(0, 2, 2), (10, 3, 1)]
    assert lora.points[1].value.half_width == pytest.approx(12.706, abs=1e-3)
    assert panel.chance == ((0, 0.75), (10, 0.75))


def test_lines_through_blocks_are_those_after_training_beside_all_before(quantity):
    panel = by_block(quantity, STYLES)
    before, lora, _ = panel.lines
    assert before.style == INK
    assert [(x, value.mean) for x, value in before.points] == [(0, 1.5), (1, 3)]
    assert [(x, value.mean) for x, value in lora.points] == [(0, 4.5), (1, 7)]
    assert panel.chance == ((0, 0.5), (1, 1.0))


def test_changes_are_paired_by_episode(quantity):
    table = change_table([quantity], STYLES, "lora")
    assert table.columns == ("measure", "lora", "tir", "tir − lora")
    ((name, lora, tir, pair),) = table.rows
    assert name == "x"
    assert (lora.estimate.mean, lora.estimate.episodes) == (3, 2)
    assert (tir.estimate.mean, tir.estimate.episodes) == (1, 1)
    assert (pair.estimate.mean, pair.estimate.episodes) == (-3, 1)


def test_without_a_second_step_nothing_has_changed():
    assert change_table(quantities(rows()[:2]), STYLES, "lora") is None


def test_nothing_found_is_an_empty_panel():
    (only,) = quantities([row._replace(value=None, chance=None) for row in rows()])
    assert by_step(only, STYLES).is_empty
    assert by_block(only, STYLES).is_empty


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "run"
    return read_maps(write_run(folder, episodes=2))


def test_similarity_is_cka_in_each_block(maps):
    own, pair = similarity_panels(maps, {"zero-shot": 0, "lora": 1, "tir": 2}, "lora")
    lora = {each.episode: each for each in maps if each.arm == "lora"}
    tir = {each.episode: each for each in maps if each.arm == "tir"}
    expected = [linear_cka(each.tokens_before[2], each.tokens_after[2]) for each in lora.values()]
    assert own.lines[1].points[2].value.mean == pytest.approx(np.mean(expected))
    assert [line.label for line in pair.lines] == ["zero-shot", "tir"]
    expected = [linear_cka(tir[n].tokens_after[0], lora[n].tokens_after[0]) for n in (0, 1)]
    assert pair.lines[1].points[0].value.mean == pytest.approx(np.mean(expected))
    assert similarity_panels([], STYLES, "lora") == ()


def test_the_gallery_shows_images_of_all_classes_in_turn(maps):
    labels = np.array([1, 1, 0, 0, 2])
    shown = gallery([each._replace(labels=labels) for each in maps], ["lora", "tir"], 4)
    names = maps[0].class_names
    assert [picture.label for picture in shown.pictures] == [names[n] for n in (0, 1, 2, 0)]
    assert [arm for arm, _ in shown.pictures[0].rows] == ["lora", "tir"]
    titles = [tile.title for tile in shown.pictures[0].rows[0][1]]
    assert titles[5:] == ["classes that pick it", "attention before", "attention after"]
    assert len(shown.count_colours) == 6
    assert gallery([], ["lora"], 5) is None
