"""Episodes whose queries are all images that are not support, or all of a part for queries."""

import json

import fake_engine
import numpy as np
import pytest
import torch
from command_line import results, with_value
from fewshot.training_cases import assert_same, make_model, make_tokenizer
from open_clip.transform import PreprocessCfg
from PIL import Image
from small_images import write_images

from tir_kernels.analysis.page.page import write_page
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot import Protocol, Runtime, finetune_episode, finetune_episodes
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.data import load
from tir_kernels.fewshot.data import reader as reading
from tir_kernels.fewshot.data.cache import ImageCache
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.draw import draw_episode, require_groups
from tir_kernels.fewshot.data.queries import QueryImages
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.split import load_split
from tir_kernels.fewshot.run.folder import read_run, read_settings
from tir_kernels.fewshot.train import batch
from tir_kernels.towers.loading.preprocess import Preprocess

SIZES = {"ClassA": 4, "ClassB": 9, "ClassC": 6}
ALL = Protocol(ways="all", shots=2, queries="all", seed=1)
preprocess = fake_engine.small_preprocess


@pytest.fixture
def reads_in_parts(monkeypatch):
    """No query image is held."""
    monkeypatch.setattr(load, "_HELD_BYTES", 0)


@pytest.fixture
def split(tmp_path):
    """Data with a part for support and one for queries, of uneven classes."""
    train = write_images(tmp_path / "split" / "train", dict.fromkeys(SIZES, 5))
    test = write_images(tmp_path / "split" / "test", SIZES, seed=1)
    return load_split(train, test)


def episode_of(data, images=None, protocol=ALL, index=0):
    images = ImageReader(data, preprocess) if images is None else images
    plan = draw_episode(data, protocol, index)
    queries = protocol.queries_per_class
    return load.load_episode(plan, data, images, shots=protocol.shots, queries=queries)


def test_all_that_is_not_support_is_asked(make_images):
    data = load_data(make_images(SIZES))
    for index in range(3):
        episode = episode_of(data, index=index)
        counts = {name: number - 2 for name, number in SIZES.items()}
        asked = [counts[name] for name in episode.folders]
        assert torch.bincount(episode.query_labels).tolist() == asked
        together = torch.cat([episode.support_images, episode.query_images[:]]).flatten(1)
        assert len(torch.unique(together, dim=0)) == len(together) == sum(SIZES.values())


def test_the_whole_part_for_queries_is_asked(split):
    first, second = (episode_of(split, index=index) for index in range(2))
    for episode in (first, second):
        assert sorted(episode.folders) == sorted(SIZES)
        asked = dict(
            zip(episode.folders, torch.bincount(episode.query_labels).tolist(), strict=True)
        )
        assert asked == SIZES
    # Another draw of shots, and the same queries.
    assert not torch.equal(
        first.support_images.flatten(1).sort(0)[0], second.support_images.flatten(1).sort(0)[0]
    )
    sums = [each.query_images[:].flatten(1).sum(1).sort()[0] for each in (first, second)]
    torch.testing.assert_close(*sums)


def test_the_draw_of_the_shots_does_not_depend_on_the_number_of_queries(split):
    few = Protocol(ways=3, shots=2, queries=1, seed=1)
    expected = episode_of(split, protocol=few)
    episode = episode_of(split)
    assert episode.folders == expected.folders
    assert torch.equal(episode.support_images, expected.support_images)


@pytest.mark.parametrize("queries", ["all", 3])
def test_read_in_parts_they_are_the_same(make_images, split, queries, monkeypatch):
    protocol = Protocol(ways=2, shots=1, queries=queries)
    for data in (load_data(make_images(SIZES)), split):
        held = episode_of(data, protocol=protocol)
        assert isinstance(held.query_images, torch.Tensor)
        with monkeypatch.context() as patch:
            patch.setattr(load, "_HELD_BYTES", 0)
            parts = episode_of(data, protocol=protocol)
        assert isinstance(parts.query_images, QueryImages)
        assert parts.query_images.shape == held.query_images.shape
        assert torch.equal(parts.query_images[:], held.query_images)
        assert torch.equal(parts.query_images[1:3], held.query_images[1:3])
        assert parts.query_images[2:2].shape == (0, 3, 8, 8)
        assert torch.equal(parts.query_labels, held.query_labels)
        assert torch.equal(parts.support_images, held.support_images)


def test_no_more_than_a_batch_is_in_memory(make_images, reads_in_parts, monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "_CHECKED_AT_ONCE", 4)
    monkeypatch.setattr(batch, "CLASSIFIED_AT_ONCE", 4)
    data = load_data(make_images({"ClassA": 30, "ClassB": 20}))
    cache = ImageCache(tmp_path / "cache", preprocess.shape, notify=print)
    images = ImageReader(data, preprocess, cache=cache)
    asked, read_many = [], images.read_many

    def noted(wanted):
        asked.append(len(wanted))
        return read_many(wanted)

    monkeypatch.setattr(images, "read_many", noted)
    episode = episode_of(data, images)
    assert max(asked) == 4
    assert sum(asked) == 50  # the support, and all others to see that they can be read
    assert images._held_bytes == 0
    asked.clear()
    again = episode_of(data, images)  # of which all is known but the support
    assert sum(asked) == 4
    sizes = []

    class Learner(batch.Learner):
        def inputs(self, images):
            sizes.append(images.shape[1])
            return images

        def logits(self, inputs, classes):
            return inputs.mean((3, 4))[..., :2]

    for one in (episode, again):
        learner = Learner()
        queries = batch._InputSet(
            batch.Job(None, None, None, 0, Runtime()), learner, [one], "query_images"
        )
        (logits,) = batch._classify(learner, 2, queries)
        torch.testing.assert_close(logits[0], one.query_images[:].mean((2, 3))[:, :2])
    assert max(sizes) == 4
    assert sum(sizes) == 2 * 46


def test_episodes_of_unequal_queries_are_trained_together(tmp_path, monkeypatch):
    config = PreprocessCfg(size=32, mean=(0, 0, 0), std=(1, 1, 1), resize_mode="squash")
    data = load_data(write_images(tmp_path / "images", {**SIZES, "ClassD": 5}))
    images = ImageReader(data, Preprocess(config))
    protocol = Protocol(ways=2, shots=2, queries="all")
    episodes = [episode_of(data, images, protocol, index) for index in range(4)]
    assert len({len(episode.query_images) for episode in episodes}) > 1
    monkeypatch.setattr(batch, "CLASSIFIED_AT_ONCE", 8)  # 2 of each
    calls = []
    finetune_batch = batch.finetune_batch
    monkeypatch.setattr(
        "tir_kernels.fewshot.train.loop.finetune_batch",
        lambda job, chosen, on_step: (
            calls.append(len(chosen)) or finetune_batch(job, chosen, on_step)
        ),
    )
    (arm,) = make_arms(["lora"], (), {"steps": 2, "lora_rank": 2})
    model, tokenizer = make_model(), make_tokenizer()
    together = finetune_episodes(model, tokenizer, episodes, arm.method)
    assert calls == [4]
    for episode, result in zip(episodes, together, strict=True):
        assert len(result.query_logits) == len(episode.query_labels)
        assert_same(result, finetune_episode(model, tokenizer, episode, arm.method))


def test_unreadable_queries(make_images, reads_in_parts):
    root = make_images(SIZES)
    data = load_data(root)
    plan = draw_episode(data, ALL, 0)
    c = plan.classes.index(1)
    bad = data.classes[1].files[plan.orders[c][5]]
    (root / bad).write_bytes(b"damaged")
    with pytest.raises(FewShotError, match=bad):
        episode_of(data)
    lenient = ImageReader(data, preprocess, skip_unreadable=True)
    for _ in range(2):
        episode = episode_of(data, lenient)
        assert episode.skipped == (bad,)
        assert torch.bincount(episode.query_labels)[c] == SIZES["ClassB"] - 2 - 1
        assert len(episode.query_images[:]) == len(episode.query_labels)
    gone = data.classes[1].files[plan.orders[c][6]]
    (root / gone).write_bytes(b"damaged")
    lenient._held.clear()
    with pytest.raises(FewShotError, match=f"image {gone} of class 'ClassB' was readable when"):
        episode.query_images[:]


def test_sizes_that_can_not_be_drawn(make_images, split):
    data = load_data(make_images(SIZES))
    data.require(ways=3, shots=3, queries=None)
    with pytest.raises(FewShotError, match=r"has 4 images but 5 are needed \(4 shots \+ a query\)"):
        data.require(ways=3, shots=4, queries=None)
    with pytest.raises(FewShotError, match=r"lower shots$"):
        data.require(ways=3, shots=4, queries=None)
    split.require(ways=3, shots=5, queries=None)
    with pytest.raises(FewShotError, match=r"has 5 images for support but shots=6 are needed"):
        split.require(ways=3, shots=6, queries=None)
    for wrong in ("some", 1.5, None):
        with pytest.raises(TypeError, match="queries must be an int or 'all'; got"):
            Protocol(queries=wrong)
        with pytest.raises(TypeError, match="ways must be an int or 'all'; got"):
            Protocol(ways=wrong)
    with pytest.raises(ValueError, match="queries must be at least 1; got 0"):
        Protocol(queries=0)


def test_groups_stay_apart(tmp_path, reads_in_parts):
    lines, subjects = ["file,label,patient"], []
    (tmp_path / "listed").mkdir()
    for number in range(48):
        label, subject = "ab"[number % 2], f"s{number % 16 // 2}"  # eight subjects, in both classes
        image = Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8))
        image.save(tmp_path / "listed" / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{label},{subject}")
        subjects.append(subject)
    (tmp_path / "listed" / "list.csv").write_text("\n".join(lines))
    data = load_data(tmp_path / "listed" / "list.csv", group_column="patient")
    require_groups(data, ALL, 5)
    for index in range(5):
        episode = episode_of(data, index=index)

        def shown(images):
            return {subjects[round(255 * float(image.mean()))] for image in images}

        support, asked = shown(episode.support_images), shown(episode.query_images[:])
        assert not support & asked
        assert support | asked == set(subjects)  # nobody else is left out
        assert len(episode.query_labels) == 48 - 6 * len(support)
    too_many = Protocol(ways=2, shots=24, queries="all")
    with pytest.raises(FewShotError, match=r"24 shots and a query from .* lower shots or ways, or"):
        draw_episode(data, too_many, 0)


@pytest.fixture
def coop(arguments, tmp_path, split):
    """A run of all classes, all of the test part, in three draws."""
    options = ["--ways=all", "--queries=all", "--episodes=3"]
    return [*with_value(arguments, "--data", str(tmp_path / "split")), *options]


def refused(capsys, arguments):
    """The last line of a command that is refused."""
    capsys.readouterr()
    assert fake_engine.run_main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_of_all_ways_and_queries(coop, tmp_path, capsys):
    assert fake_engine.run_main(coop) == 0
    told = capsys.readouterr().err
    assert "--queries all: each method classifies up to 19 images an episode, 64 at once" in told
    assert "a class with more images weighs more" in told
    records = read_run(tmp_path / "out")
    assert {record.episode for record in records} == {0, 1, 2}
    assert {record.total for record in records} == {19}
    for record in records:
        assert sorted(record.classes) == sorted(SIZES)
        assert record.accuracy == record.correct / 19
    settings = read_settings(tmp_path / "out")["settings"]
    assert (settings["ways"], settings["queries"]) == (3, "all")
    # The number of ways may be given, too, and with more draws it goes on.
    more = with_value(with_value(coop, "--ways", "3"), "--episodes", "4")
    assert fake_engine.run_main(more) == 0
    assert [r for r in read_run(tmp_path / "out") if r.episode < 3] == records
    assert "--queries was all, is 2" in refused(capsys, with_value(more, "--queries", "2"))
    write_page([tmp_path / "out"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "a class with more of them weighs more" in page


def test_read_in_parts_a_run_is_the_same(coop, tmp_path, monkeypatch):
    assert fake_engine.run_main(coop) == 0
    monkeypatch.setattr(load, "_HELD_BYTES", 0)
    other = with_value(coop, "--out", str(tmp_path / "parts"))
    assert fake_engine.run_main(other) == 0
    assert results(tmp_path / "parts") == results(tmp_path / "out")
    assert json.loads((tmp_path / "parts" / "summary.json").read_text())


def test_words_that_are_no_number(coop, capsys):
    for name in ("--ways", "--queries"):
        told = refused(capsys, with_value(coop, name, "every"))
        assert f"'{name}': 'every' is neither a whole number nor all" in told
    told = refused(capsys, with_value(coop, "--shots", "6"))
    assert "images for support but --shots 6 are needed" in told
