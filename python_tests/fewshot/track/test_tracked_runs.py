"""Tracked runs from the command line: rows, maps, resumption, and kills at any moment."""

import json
import multiprocessing
import os
import random
import signal
import time
from unittest import mock

import fake_engine
import pytest
from command_line import SMALL, assert_refused, results, with_value

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.folder import read_run
from tir_kernels.fewshot.run.maps import read_maps
from tir_kernels.fewshot.run.tracked import Series, Track, read_tracked, read_tracks
from tir_kernels.fewshot.track import watcher

forking = multiprocessing.get_context("fork")
ARMS = ["--method=lora", "--method=tir", "--method=zero-shot"]


@pytest.fixture
def small(make_images, tiny_model_folder):
    root = make_images()

    def arguments(out, *more):
        options = ["run", "--data", str(root), "--model", str(tiny_model_folder)]
        return [*options, "--out", str(out), *SMALL.split(), *ARMS, "--steps=3", *more]

    return arguments


@pytest.mark.slow
def test_a_tracked_run_has_the_results_of_an_untracked_one(small, tmp_path):
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    assert main(small(plain)) == 0
    track = "--track=every=2,measures=sink-ratio+norm-outliers,maps=1"
    assert main(small(tracked, track)) == 0
    assert results(plain) == results(tracked)
    assert read_tracked(plain) == []
    assert list(read_maps(plain)) == []
    rows = read_tracked(tracked)
    assert {(row.episode, row.arm) for row in rows} == {
        (episode, arm) for episode in range(3) for arm in ("lora", "tir")
    }
    assert {row.step for row in rows} == {0, 2, 3}
    assert {row.block for row in rows} == set(range(5))
    assert {row.measure for row in rows} == {"sink-ratio", "norm-outliers"}
    assert [(maps.episode, maps.arm) for maps in read_maps(tracked)] == [(0, "lora"), (0, "tir")]
    assert all(maps.images.shape == (6, 32, 32, 3) for maps in read_maps(tracked))
    settings = json.loads((tracked / "settings.json").read_text())["settings"]
    assert settings["track"] == "every=2,measures=sink-ratio+norm-outliers,maps=1"
    assert "track" not in json.loads((plain / "settings.json").read_text())["settings"]


@pytest.mark.slow
def test_episodes_at_once_have_the_rows_of_each_alone(small, tmp_path):
    track = "--track=every=2,measures=sink-ratio,maps=0"
    assert main(small(tmp_path / "one", track)) == 0
    assert main(small(tmp_path / "three", track, "--parallel-episodes=3")) == 0
    one, three = (read_tracked(tmp_path / name) for name in ("one", "three"))
    assert [row._replace(value=0) for row in one] == [row._replace(value=0) for row in three]
    assert [row.value for row in one] == pytest.approx([row.value for row in three], abs=0.1)


@pytest.mark.slow
def test_continued_with_more_episodes_equals_at_once(small, tmp_path):
    track = "--track=every=2,measures=sink-ratio,maps=1"
    assert main(with_value(small(tmp_path / "grown", track), "--episodes", "1")) == 0
    assert main(small(tmp_path / "grown", track)) == 0
    assert main(small(tmp_path / "whole", track)) == 0
    assert read_tracked(tmp_path / "grown") == read_tracked(tmp_path / "whole")


def test_tracking_is_a_setting_of_the_run(arguments, capsys):
    run = with_fake_tracker
    assert run([*arguments, "--track=every=2,maps=0"]) == 0
    capsys.readouterr()
    for other in ([], ["--track=every=3,maps=0"]):
        assert_refused(capsys, [*arguments, *other], "--track was every=2,maps=0", program=run)


@pytest.mark.parametrize("text", ["10", "every=0", "measures=none", "maps=x"])
def test_options_that_are_refused(arguments, capsys, text):
    assert_refused(capsys, [*arguments, "--track", text], "--track", program=with_fake_tracker)


class FakeTracker:
    """Rows that belong to the episode, the arm and the time of training."""

    def __init__(self, model, every, measures):
        self.every = every
        self.seen = []

    def start(self, episodes):
        self.seen += [episode.index for episode in episodes]

    def observe(self, step, learner, inputs):
        pass

    def track(self, episode, arm):
        assert episode in self.seen
        values = [[float(episode), len(arm) + block / 7] for block in range(200)]
        series = Series("measure", "quantity", [0, 1], [[0.5, None]], values)
        return Track(episode, arm, list(range(200)), [series])


def with_fake_tracker(arguments):
    with mock.patch.object(watcher, "Tracker", FakeTracker):
        return fake_engine.run_main(arguments)


@pytest.mark.slow
def test_killed_over_and_over(make_images, tmp_path):
    out, reference = tmp_path / "out", tmp_path / "reference"
    small = "--model fake --ways=3 --shots=2 --queries=4 --steps=2 --backend=reference"
    options = ["run", "--data", str(make_images()), "--episodes=60", *small.split()]
    options += ["--track=every=1,maps=0"]
    assert with_fake_tracker([*options, "--out", str(reference)]) == 0
    delays = random.Random(0)
    tracked = out / "tracked.jsonl"
    write = os.write

    def slow_write(file, content):
        # Each line in many parts, as a disk that is slow.
        time.sleep(0.002)
        return write(file, content[: max(1, len(content) // 6)])

    def live():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with mock.patch("tir_kernels.fewshot.run.appended.os.write", slow_write):
            os._exit(with_fake_tracker([*options, "--out", str(out)]))

    def size():
        return tracked.stat().st_size if tracked.exists() else 0

    torn = orphans = 0
    for _ in range(20):
        before = size()
        process = forking.Process(target=live)
        process.start()
        deadline = time.monotonic() + 60
        while size() <= before + 5000 and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delays.uniform(0, 0.15))
        process.kill()
        process.join()
        torn += not tracked.read_bytes().endswith(b"\n")
        lines = tracked.read_bytes().count(b"\n")
        records = (out / "episodes.jsonl").read_bytes().count(b"\n")
        orphans += lines > records
        # What is there at this moment can be read, and is whole.
        assert len(list(read_tracks(out))) == len(read_run(out))
    assert torn > 0, "no kill hit the middle of a line"
    assert orphans > 0, "no kill hit between a track and its record"
    assert with_fake_tracker([*options, "--out", str(out)]) == 0
    assert read_tracked(out) == read_tracked(reference)
    assert results(out) == results(reference)


@pytest.mark.slow
def test_an_ablation_ends_with_its_tables(make_images, tiny_model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["ablate", "--data", str(make_images()), "--model", str(tiny_model_folder)]
    sizes = ["--ways=3", "--shots=2", "--queries=4", "--episodes=2", "--steps=2", "--device=cpu"]
    arguments = [*options, "--out", str(out), *sizes, "--track=every=2,measures=sink-ratio,maps=0"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name in ("lora", "tir@random", "tir@suppress", "linear-probe", "Holm", "sink ratio"):
        assert name in shown.replace("\n", ""), name
    content = json.loads((out / "ablation.json").read_text())
    assert len(content["accuracy"]) == 13
    assert content["baseline"] == "lora"
    assert {own["arm"] for own in content["changes"][0]["arms"]} >= {"tir@centroids", "lora"}
    assert main(arguments) == 0  # shows a finished one again
