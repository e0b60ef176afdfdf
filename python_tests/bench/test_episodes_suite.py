"""Whole runs, of ours and of the published program, on drawings and models that take no time."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner
from PIL import Image
from small_clip import write_small_clip

pytest.importorskip("open_clip")

from bench import workload
from bench.command import main
from bench.counting import Cost, episode_cost
from bench.plain_clip import Training
from bench.settings import Settings
from bench.suites import episodes
from bench.suites.episodes import (
    RunOutcome,
    as_was_published,
    disagreement,
    ours,
    run_episodes,
    start_up_seconds,
)
from bench.workload import Workload
from tir_kernels.demo import write_image_folder
from tir_kernels.fewshot import NonFiniteLossError, Runtime
from tir_kernels.fewshot.methods.tir import TIR

pytestmark = [pytest.mark.usefixtures("low_ceilings", "drawn_once"), pytest.mark.slow]

SMALL = ["episodes", "--device", "cpu", "--threads", "1", "--ways", "3", "--shots", "2"]
SMALL += ["--queries", "4", "--episodes", "2", "--steps", "3"]
KINDS = ["start-up to the first step", "whole run, tir", "whole run, lora"]


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """The images that a workload draws, which are the same each time."""
    return write_image_folder(tmp_path_factory.mktemp("workload") / "drawings")


@pytest.fixture
def drawn_once(drawings, monkeypatch) -> None:
    """Workloads read one folder of drawings."""
    monkeypatch.setattr(workload, "write_image_folder", lambda folder: drawings)


@pytest.fixture
def no_start(monkeypatch) -> None:
    """The start-up, which takes seconds, takes none."""
    monkeypatch.setattr(episodes, "start_up_seconds", lambda *_: 2.5)


@pytest.mark.usefixtures("no_start")
def test_both_programs_run_the_same_episodes(tmp_path):
    path = tmp_path / "records.json"
    output = run(*SMALL, "--parallel-episodes", "1,2", "--json", path)
    records = json.loads(path.read_text())
    names = {}
    for record in records:
        names.setdefault(record["operator"], []).append(record["implementation"])
    both = ["tir auto", "tir auto, 2 at once", "published float32"]
    started, *whole = (f"{kind} (drawings, demo)" for kind in KINDS)
    assert names == {started: ["tir auto"], **{operator: both for operator in whole}}
    sizes = {"ways": 3, "shots": 2, "L": 65, "D": 128}
    for record in records:
        if record["operator"] == started:
            assert record["ms"] == 2500
            assert record["shape"] == sizes
            continue
        assert record["shape"] == sizes | {"queries": 4, "steps": 3}
        assert record["ms"] > 0
        assert record["fraction_of_bound"] > 0
        assert record["episodes"] == 2
        assert record["episodes_per_hour"] == pytest.approx(3.6e6 / record["ms"])
        assert 24 * record["accuracy"] == pytest.approx(round(24 * record["accuracy"]))
    assert all(f"{r['accuracy']:.1%}" in output for r in records if "accuracy" in r)
    assert "published float32: 2 of 2 episodes" in output
    assert "0 shapes measured, 3 kept" in run(*SMALL, "--parallel-episodes", "1,2", "--json", path)


@pytest.mark.usefixtures("no_start")
def test_other_types_episodes_and_models(tmp_path):
    path, model = tmp_path / "records.json", write_small_clip(tmp_path)
    options = ["--dtypes", "bfloat16", "--published-episodes", "1", "--model", model]
    run(*SMALL, *options, "--json", path)
    found = {
        r["implementation"]: r["episodes"]
        for r in json.loads(path.read_text())
        if r["operator"] == "whole run, tir (drawings, small)"
    }
    assert found == {"tir auto": 2, "published float32": 1, "published bfloat16": 1}


@pytest.mark.usefixtures("no_start")
def test_a_wrong_first_loss_is_refused(tmp_path, monkeypatch):
    from bench.published import PublishedStep

    plain = PublishedStep._encode_images
    monkeypatch.setattr(PublishedStep, "_encode_images", lambda *a: -plain(*a))
    path = tmp_path / "records.json"
    output = run(*SMALL, "--json", path, status=1)
    assert "WRONG: published float32" in output
    for record in json.loads(path.read_text()):
        if record["implementation"] == "published float32":
            assert "in float64" in record["wrong"]
            assert record["ms"] is None


@pytest.mark.usefixtures("no_start")
def test_results_unlike_the_published_ones_are_refused(tmp_path, monkeypatch):
    def guessing(*arguments):
        train = ours(*arguments)
        return lambda numbers: ((loss, 0.0) for loss, _ in train(numbers))

    monkeypatch.setattr(episodes, "ours", guessing)
    path = tmp_path / "records.json"
    many = ["--queries", "30", "--steps", "1"]
    output = run(*SMALL, *many, "--json", path, status=1)
    assert "WRONG: tir auto: accuracy 0.0% over 2 episodes" in " ".join(output.split())
    of_ours = [
        r
        for r in json.loads(path.read_text())
        if r["implementation"] == "tir auto" and "whole run" in r["operator"]
    ]
    assert len(of_ours) == 2
    assert all(r["ms"] is None and "accuracy" in r["wrong"] for r in of_ours)


@pytest.mark.usefixtures("no_start")
def test_a_run_that_breaks_off_is_left_out_with_its_reason(tmp_path, monkeypatch):
    def diverging(workload, training):
        if training.method.steps == 1:  # the check before
            return ours(workload, training)
        raise NonFiniteLossError(2, [1.0, 1.5, float("inf")])

    monkeypatch.setattr(episodes, "ours", diverging)
    path = tmp_path / "records.json"
    run(*SMALL, "--json", path)
    whole = [r for r in json.loads(path.read_text()) if "whole run" in r["operator"]]
    for record in whole:
        if record["implementation"] == "tir auto":
            assert "the loss became inf at step 3" in record["skipped"]
            assert record["ms"] is None
        else:
            assert record["ms"] > 0


@pytest.mark.parametrize("good_starts", [0, 1])
def test_a_start_up_that_fails_is_left_out_with_its_reason(tmp_path, monkeypatch, good_starts):
    starts = []

    def failing(*_):
        starts.append(1)
        if len(starts) > good_starts:
            raise RuntimeError("no training step within 300 s")
        return 2.5

    monkeypatch.setattr(episodes, "start_up_seconds", failing)
    path = tmp_path / "records.json"
    run(*SMALL, "--json", path)
    (record,) = (r for r in json.loads(path.read_text()) if "start-up" in r["operator"])
    assert record["ms"] is None
    assert "no training step" in record["skipped"]


def outcome(accuracies, losses=(1.5, 1.4), queries=75):
    return RunOutcome(1.0, list(losses), list(accuracies), queries)


def test_disagreement():
    assert disagreement(outcome([0.6, 0.7]), outcome([0.62, 0.66]), "float32") == ""
    assert disagreement(outcome([1.0, 1.0]), outcome([1.0, 1.0]), "float32") == ""
    assert "accuracy 20.0% over 2" in disagreement(
        outcome([0.2, 0.2]), outcome([0.62, 0.66]), "float32"
    )
    # Only episodes that both ran count.
    assert disagreement(outcome([0.6, 0.0, 0.0]), outcome([0.6]), "float32") == ""
    assert "episode 1" in disagreement(
        outcome([0.6, 0.6], (1.5, 1.45)), outcome([0.6, 0.6]), "float32"
    )
    assert disagreement(outcome([0.6, 0.6], (1.5, 1.43)), outcome([0.6, 0.6]), "bfloat16") == ""


def test_the_same_episode_has_the_same_first_loss_in_both():
    workload = Workload(Settings(ways=3, queries=2), [2])
    training = Training(TIR(steps=1, logit_scale=100), Runtime(), shots=2)
    one, other = (
        run_episodes(program(workload, training), 3, workload.queries, 2, lambda line: None)
        for program in (ours, as_was_published)
    )
    assert one.first_losses == pytest.approx(other.first_losses, rel=1e-2)
    assert statistics.pstdev(one.first_losses) > 0.1, "episodes differ"
    assert one.queries == other.queries == 6
    assert len(one.accuracies) == len(other.accuracies) == 3


def test_start_up_ends_at_the_first_step(tmp_path):
    workload = Workload(Settings(ways=3), [2])
    training = Training(TIR(steps=100_000), Runtime(), shots=2)
    assert 0.5 < start_up_seconds(workload, training, 3, tmp_path / "run") < 120
    assert (tmp_path / "run" / "settings.json").exists()


def test_a_start_that_fails_says_why(tmp_path):
    workload = Workload(Settings(ways=3), [2])
    training = Training(TIR(), Runtime(), shots=2)
    with pytest.raises(RuntimeError, match=r"tir-finetune ended with 2: .*--ways 50"):
        start_up_seconds(workload, training, 50, tmp_path / "run")
    with pytest.raises(RuntimeError, match="took no training step"):
        start_up_seconds(workload, training.of_method("zero-shot"), 3, tmp_path / "other")


def write_images(folder, classes, count):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.png")
    return folder


def test_episodes_are_drawn_from_a_folder(tmp_path):
    data = write_images(tmp_path / "images", ["AnnualCrop", "sea_lake", "x"], 5)
    names = {"x": "highway", "AnnualCrop": "annual crop", "sea_lake": "sea lake"}
    (data / "class_names.json").write_text(json.dumps(names))
    workload = Workload(Settings(data=str(data), ways=3, queries=2), [3])
    drawn = [workload.files(index, 3) for index in range(4)]
    assert sorted(drawn[0].class_names) == ["annual crop", "highway", "sea lake"]
    assert drawn[0].labels(drawn[0].support).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert drawn[0].labels(drawn[0].queries).tolist() == [0, 0, 1, 1, 2, 2]
    folders = {"annual crop": "AnnualCrop", "sea lake": "sea_lake", "highway": "x"}
    for episode in drawn:
        assert len({*episode.support, *episode.queries}) == 15
        for files in (episode.support, episode.queries):
            named = [folders[episode.class_names[label]] for label in episode.labels(files)]
            assert [file.parent.name for file in files] == named
    assert workload.files(1, 3) == drawn[1]
    assert len({tuple(episode.support) for episode in drawn}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"ways": 3}, "is more than the 2 classes"),
        ({"queries": 5}, "class 'one' in .* has 5 images but 6 are needed"),
        ({"model": "ViT-B-61"}, "did you mean ViT-B-16"),
    ],
)
def test_unusable_input_is_refused(tmp_path, changes, message):
    data = write_images(tmp_path / "images", ["one", "two"], 5)
    settings = replace(Settings(data=str(data), ways=2, queries=2), **changes)
    with pytest.raises(click.ClickException, match=message):
        Workload(settings, [1])


def test_cost_of_an_episode():
    assert episode_cost(Cost(10, 100), 7, Cost(30, 400)) == Cost(85, 900)


def test_no_cases_without_training():
    assert episodes.episode_cases(Settings(directions=("forward",))) == []
