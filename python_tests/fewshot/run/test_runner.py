"""The loop over episodes and arms, and the summary of what it found."""

import contextlib
import io
import json
import math
from dataclasses import replace
from unittest import mock

import fake_engine
import pytest
import torch
from rich.console import Console
from scipy import stats

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import episode_seed
from tir_kernels.fewshot.run.folder import RunFolder
from tir_kernels.fewshot.run.journal import JournalReader
from tir_kernels.fewshot.run.records import Record
from tir_kernels.fewshot.run.runner import RunPlan, run_episodes
from tir_kernels.fewshot.run.shown_arms import shown_arms
from tir_kernels.fewshot.run.summary import Estimate, print_summary, summarise
from tir_kernels.fewshot.settings import Arm, Protocol, Runtime
from tir_kernels.fewshot.train import loop
from tir_kernels.fewshot.train.loop import NonFiniteLossError
from tir_kernels.fewshot.trainer import Trainer
from tir_kernels.towers.loading.models import load_model

METHODS = ("tir", "lora", "zero-shot")


class Setting:
    """A run on small images in a folder."""

    def __init__(self, root, folder):
        self.data = load_data(root)
        self.images = ImageReader(self.data, fake_engine.small_preprocess)
        self.model = fake_engine.fake_model()
        self.path = folder / "episodes.jsonl"
        self.runtime = Runtime(backend="reference")
        steps = {"tir": {"steps": 3}, "lora": {"steps": 3}, "zero-shot": {}}
        arms = tuple(Arm.of(name, **options) for name, options in steps.items())
        self.plan = RunPlan(Protocol(ways=3, shots=2, queries=4), episodes=4, arms=arms)

    def run(self, finetune=fake_engine.fake_finetune, **options):
        trainer = Trainer(self.model, self.plan.protocol.seed, self.runtime)
        stand_in = contextlib.nullcontext()
        if finetune is not None:
            stand_in = mock.patch.object(loop, "finetune", fake_engine.at_once(finetune))
        with RunFolder(self.path.parent) as folder, folder.journal() as journal, stand_in:
            return list(
                run_episodes(self.plan, self.data, self.images, trainer, folder, journal, **options)
            )


@pytest.fixture
def setting(make_images, tmp_path):
    return Setting(make_images(), tmp_path)


def timeless(records):
    return [replace(record, seconds=0, seconds_per_step=None) for record in records]


def test_every_arm_sees_the_same_episodes_and_seeds(setting):
    calls = []

    def spy(episode, method, seed, on_step):
        calls.append((method, episode, seed))
        return fake_engine.fake_finetune(episode, method, seed, on_step)

    records = setting.run(spy)
    assert [record.key for record in records] == [(e, m) for e in range(4) for m in METHODS]
    for index in range(4):
        first, *others = calls[3 * index : 3 * index + 3]
        assert first[2] == episode_seed(0, index)
        for other in others:
            assert other[1] is first[1]
            assert other[2] == first[2]
    one = records[0]
    assert one.total == 12
    assert one.accuracy == one.correct / 12
    assert one.final_loss == pytest.approx(1 / 3)
    assert one.status == "ok"
    assert one.seconds_per_step is not None
    assert records[2].final_loss is None
    assert records[2].seconds_per_step is None
    assert set(one.classes) <= {f"Class{c}" for c in "ABCDEF"}


def test_steps_are_reported(setting):
    setting.plan = replace(setting.plan, episodes=1)
    steps = []
    setting.run(on_step=lambda *step: steps.append(step))
    expected = [(0, method, step) for method in ("tir", "lora") for step in range(3)]
    assert [step[:3] for step in steps] == expected


@pytest.mark.parametrize("stop_after", [0, 1, 4, 7, 11])
def test_stopped_and_continued_equals_uninterrupted(setting, stop_after):
    whole = timeless(setting.run())
    setting.path.unlink()
    calls = 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise KeyboardInterrupt
        return fake_engine.fake_finetune(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        setting.run(interrupted)
    assert timeless(JournalReader(setting.path.parent).news()) == whole[:stop_after]
    assert timeless(setting.run()) == whole[stop_after:]
    assert timeless(JournalReader(setting.path.parent).news()) == whole
    assert setting.run() == []


@pytest.mark.parametrize("parallel", [2, 3, 9])
def test_several_at_once_give_the_same_records(setting, parallel):
    whole = timeless(setting.run())
    setting.path.unlink()
    setting.plan = replace(setting.plan, parallel=parallel)
    together = timeless(setting.run())
    assert sorted(together, key=lambda r: (r.episode, METHODS.index(r.arm))) == whole
    # Groups are as even as they can be.
    group = {2: 2, 3: 2, 9: 4}[parallel]
    assert [record.arm for record in together[: group + 1]] == ["tir"] * group + ["lora"]


def test_auto_takes_what_fits_for_every_arm(setting, monkeypatch):
    asked = []

    def episodes_that_fit(model, tokenizer, episode, method, runtime):
        asked.append((method.name, runtime.checkpoint))
        return {"tir": 2, "lora": 3}[method.name]

    monkeypatch.setattr("tir_kernels.fewshot.train.loop.episodes_that_fit", episodes_that_fit)
    setting.plan = replace(setting.plan, parallel="auto")
    setting.runtime = replace(setting.runtime, checkpoint=True)
    records = setting.run()
    assert asked == [("tir", True), ("lora", True)]
    assert [record.arm for record in records[:3]] == ["tir", "tir", "lora"]
    assert setting.run() == []
    assert len(asked) == 2  # a finished run asks for nothing


def test_several_at_once_go_on_where_the_run_stopped(setting):
    whole = timeless(setting.run())
    setting.path.unlink()
    setting.plan = replace(setting.plan, parallel=4)
    calls = 0

    def interrupted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls > 6:  # in the second method's episodes
            raise KeyboardInterrupt
        return fake_engine.fake_finetune(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        setting.run(interrupted)
    assert len(JournalReader(setting.path.parent).news()) == 4
    setting.plan = replace(setting.plan, parallel=2)
    setting.run()
    records = timeless(JournalReader(setting.path.parent).news())
    assert sorted(records, key=lambda r: (r.episode, METHODS.index(r.arm))) == whole


def test_more_episodes_keep_the_first_ones(setting):
    whole = timeless(setting.run())
    setting.plan = replace(setting.plan, episodes=6)
    more = setting.run()
    assert [record.episode for record in more] == [4] * 3 + [5] * 3
    setting.path.unlink()
    assert timeless(setting.run())[:12] == whole


def test_non_finite_results_are_recorded_and_the_run_goes_on(setting):
    def sick(episode, method, seed, on_step):
        if method.name == "lora":
            raise NonFiniteLossError(1, [0.5, math.nan])
        result = fake_engine.fake_finetune(episode, method, seed, on_step)
        if method.name == "zero-shot":
            result.query_logits[0, 0] = math.inf
        return result

    records = setting.run(sick)
    assert len(records) == 12
    for record in records:
        expected = {"tir": "ok", "lora": "non-finite loss", "zero-shot": "non-finite logits"}
        assert record.status == expected[record.arm]
        if record.status != "ok":
            assert record.correct is None
            assert record.accuracy is None
            assert record.final_loss is None
            assert record.total == 12
    assert JournalReader(setting.path.parent).news() == records
    summary = summarise(records, shown_arms({}, METHODS))
    assert summary.failures == (
        "lora: non-finite loss in episodes 0, 1, 2, 3; "
        "zero-shot: non-finite logits in episodes 0, 1, 2, 3"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("layers must lie between\n0 and 4"), "episode 0, tir: layers must lie between"),
        (TypeError("model has no such tower"), "episode 0, tir: model has no such tower"),
        (torch.OutOfMemoryError("CUDA ..."), "episode 0, tir: out of memory on cpu; lower queri"),
    ],
)
def test_errors_of_the_engine_become_one_line(setting, error, message):
    def refuse(*arguments, **options):
        raise error

    with pytest.raises(FewShotError, match=message):
        setting.run(refuse)


@pytest.mark.slow
def test_real_engine_on_a_tiny_model(setting, tiny_model_folder):
    setting.model = load_model(str(tiny_model_folder))
    setting.images = ImageReader(setting.data, setting.model.preprocess)
    setting.plan = replace(setting.plan, episodes=1)
    before = {key: value.clone() for key, value in setting.model.model.state_dict().items()}
    records = setting.run(finetune=None)
    assert [record.status for record in records] == ["ok"] * 3
    after = setting.model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    setting.path.unlink()
    assert timeless(setting.run(finetune=None)) == timeless(records)
    setting.path.unlink()
    setting.plan = replace(setting.plan, episodes=2, parallel=2)
    together = [record for record in setting.run(finetune=None) if record.episode == 0]
    for ours, theirs in zip(timeless(together), timeless(records), strict=True):
        assert ours.correct == theirs.correct
        if theirs.final_loss is not None:
            assert ours.final_loss == pytest.approx(theirs.final_loss, abs=1e-4)


def record(episode, arm, accuracy, seconds_per_step=None, **changes):
    values = {
        "classes": ("a", "b"),
        "correct": None if accuracy is None else round(100 * accuracy),
        "total": 100,
        "accuracy": accuracy,
        "final_loss": None,
        "seconds": 1.0,
        "status": "non-finite loss" if accuracy is None else "ok",
        "seconds_per_step": seconds_per_step,
    }
    return Record(episode=episode, arm=arm, **(values | changes))


def test_estimate_is_a_student_interval():
    values = [0.5, 0.75, 0.25, 0.9, 0.6]
    estimate = Estimate.of(values)
    low, high = stats.t.interval(0.95, 4, loc=estimate.mean, scale=stats.sem(values))
    assert estimate.mean == pytest.approx(0.6)
    assert (high - low) / 2 == pytest.approx(estimate.half_width)
    assert Estimate.of([0.5]) == Estimate(1, 0.5, None)
    assert Estimate.of([]) == Estimate(0, None, None)
    assert Estimate.of([0.2] * 9).half_width == pytest.approx(0, abs=1e-12)


def test_pairs_use_the_episodes_both_have():
    records = [
        record(0, "tir", 0.8, 2.0),
        record(0, "lora", 0.7, 1.0),
        record(1, "tir", 0.6, 4.0),
        record(1, "lora", None),
        record(2, "tir", 0.9, 3.0),
        record(2, "lora", 0.6, 2.0, skipped=("x.png",)),
        record(3, "tir", 0.1),
    ]
    summary = summarise(records, shown_arms({}, ("tir", "lora")))
    tir, lora = summary.arms
    assert tir.accuracy == Estimate.of([0.8, 0.6, 0.9, 0.1])
    assert lora.accuracy == Estimate.of([0.7, 0.6])
    assert tir.seconds_per_step == 3.0
    assert lora.failed == {1: "non-finite loss"}
    (pair,) = summary.differences
    assert pair.accuracy.episodes == 2
    assert pair.accuracy.mean == pytest.approx(0.2)
    assert summary.skipped_images == ("x.png",)
    json.dumps(summary.to_json(), allow_nan=False)


def printed(summary):
    console = Console(width=100, file=io.StringIO())
    print_summary(summary, console)
    return console.file.getvalue()


def test_tables():
    records = [record(e, m, 0.5 + 0.1 * e + 0.05 * (m == "tir")) for e in range(3) for m in METHODS]
    text = printed(summarise(records, shown_arms({}, METHODS)))
    assert "65.00 ± 24.84" in text
    for pair in ("tir (T) − lora (T)", "tir (T) − zero-shot (F)", "lora (T) − zero-shot (F)"):
        assert pair in text
    assert "F: frozen features only; T: trained on the support images, through the towers." in text
    assert "+5.00 ± 0.00" in text
    assert "no interval" not in text


def test_of_many_arms_differences_to_the_baseline_are_printed():
    arms = ["tir", "lora", *"abcde"]
    records = [record(e, arm, 0.5 + 0.01 * e * n) for e in range(3) for n, arm in enumerate(arms)]
    summary = summarise(records, shown_arms({}, arms))
    text = printed(summary)
    assert "Paired difference to lora, mean" in text
    assert "tir (T) − lora (T)" in text
    assert "a (?) − lora (T)" in text
    assert "a (?) − b (?)" not in text
    assert len(summary.differences) == 21
    (first,) = [pair for pair in summary.to_baseline if pair.first == "tir"]
    assert first.accuracy.mean == pytest.approx(-0.01)
    (last,) = [pair for pair in summary.to_baseline if pair.first == "e"]
    assert last.accuracy.mean == pytest.approx(0.05)


def test_tables_say_what_is_missing():
    records = [record(0, "tir", 0.5, skipped=("a/1.png",)), record(0, "lora", None)]
    text = printed(summarise(records, shown_arms({}, ("tir", "lora"))))
    assert "50.00 (no interval)" in text
    assert "One episode gives no interval" in text
    assert "no result" in text
    assert "skipped: a/1.png" in text
