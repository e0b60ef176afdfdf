"""Curves from tracked rows: which numbers are averaged, and over what."""

import numpy as np
import pytest
from made_runs import write_run

from tir_kernels.analysis.figures import INK
from tir_kernels.analysis.page.curves import by_block, by_step, change_table, quantities
from tir_kernels.analysis.page.gallery import gallery
from tir_kernels.analysis.page.similarity import similarity_panels
from tir_kernels.analysis.similarity import linear_cka
from tir_kernels.fewshot.run.folder import read_run
from tir_kernels.fewshot.run.maps import RunMaps
from tir_kernels.fewshot.run.shown_arms import shown_arms
from tir_kernels.fewshot.run.tracked import Series, Track

STYLES = {"lora": 0, "tir": 1}
# Arm -> episode -> step -> values of blocks 0 and 1; None: none found.
VALUES = {
    "lora": {0: {0: (1.0, 3.0), 10: (5.0, 7.0)}, 1: {0: (2.0, None), 10: (4.0, None)}},
    "tir": {0: {0: (1.0, 3.0), 10: (2.0, 4.0)}, 1: {0: (2.0, None), 10: (None, None)}},
}


def tracks(values=VALUES, chance=(0.5, 1.0)):
    return [
        Track(
            episode,
            arm,
            list(steps),
            [Series("m", "x", [0, 1], [list(chance)], [list(each) for each in steps.values()])],
        )
        for arm, episodes in values.items()
        for episode, steps in episodes.items()
    ]


@pytest.fixture
def quantity():
    (only,) = quantities(tracks())
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
    table = change_table([quantity], shown_arms({}, list(STYLES)), "lora")
    assert table.columns == ("measure", "lora (T)", "tir (T)", "tir − lora")
    ((name, lora, tir, pair),) = table.rows
    assert name == "x"
    assert (lora.estimate.mean, lora.estimate.episodes) == (3, 2)
    assert (tir.estimate.mean, tir.estimate.episodes) == (1, 1)
    assert (pair.estimate.mean, pair.estimate.episodes) == (-3, 1)


def test_without_a_second_step_nothing_has_changed():
    once = {"lora": {0: {0: (1.0, 3.0)}}}
    assert change_table(quantities(tracks(once)), shown_arms({}, list(STYLES)), "lora") is None


def test_a_change_is_over_the_blocks_that_both_ends_have():
    values = {"lora": {0: {0: (1.0, None), 5: (None, 9.0), 10: (3.0, 7.0)}}}
    (only,) = quantities(tracks(values))
    assert only.change("lora") == {0: 2.0}
    assert only.through_training("lora") == {0: {0: 1.0}, 5: {0: 9.0}, 10: {0: 5.0}}


def test_chance_is_a_mean_over_what_was_read():
    first, second = tracks({"lora": {0: {0: (1.0, 3.0)}, 1: {0: (1.0, 3.0)}}})
    other = second.series[0]._replace(chance=[[1.5, None]])
    (only,) = quantities([first, second._replace(series=[other])])
    assert only.chance == {0: 1.0, 1: 1.0}


def test_nothing_found_is_an_empty_panel():
    nothing = {"lora": {0: {0: (None, None), 10: (None, None)}}}
    (only,) = quantities(tracks(nothing, chance=(None, None)))
    assert by_step(only, STYLES).is_empty
    assert by_block(only, STYLES).is_empty


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "run"
    write_run(folder, episodes=2)
    return RunMaps(folder, read_run(folder))


def test_similarity_is_cka_in_each_block(maps):
    own, pair = similarity_panels(maps, {"zero-shot": 0, "lora": 1, "tir": 2}, "lora")
    lora = {episode: own for (episode, arm), own in maps.items() if arm == "lora"}
    tir = {episode: own for (episode, arm), own in maps.items() if arm == "tir"}
    expected = [linear_cka(each.tokens_before[2], each.tokens_after[2]) for each in lora.values()]
    assert own.lines[1].points[2].value.mean == pytest.approx(np.mean(expected))
    assert [line.label for line in pair.lines] == ["zero-shot", "tir"]
    expected = [linear_cka(tir[n].tokens_after[0], lora[n].tokens_after[0]) for n in (0, 1)]
    assert pair.lines[1].points[0].value.mean == pytest.approx(np.mean(expected))
    assert similarity_panels({}, STYLES, "lora") == ()


def test_the_gallery_shows_images_of_all_classes_in_turn(maps):
    labels = np.array([1, 1, 0, 0, 2])
    changed = {key: own._replace(labels=labels) for key, own in maps.items()}
    shown = gallery(changed, ["lora", "tir"], 4)
    names = maps[0, "lora"].class_names
    assert [picture.label for picture in shown.pictures] == [names[n] for n in (0, 1, 2, 0)]
    assert [arm for arm, _ in shown.pictures[0].rows] == ["lora", "tir"]
    titles = [tile.title for tile in shown.pictures[0].rows[0][1]]
    assert titles[5:] == ["classes that pick it", "attention before", "attention after"]
    assert len(shown.count_colours) == 6
    assert gallery({}, ["lora"], 5) is None


def test_the_gallery_reads_the_files_of_the_episode_that_it_shows(maps):
    class Counted(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    read = []
    del (counted := Counted(maps))[0, "tir"]
    assert gallery(counted, ["lora", "tir"], 4).episode == 1
    assert read == [(1, "lora"), (1, "tir")]
