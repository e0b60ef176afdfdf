"""The findings of an ablation, from a journal and its tracks."""

import io
import json
import random

import pytest
from fewshot.run.test_journal import FAILED, record
from rich.console import Console
from scipy import stats

from tir_kernels.fewshot.ablate import (
    BASELINE,
    PUBLISHED,
    ablation_arms,
    ablation_methods,
    print_ablation,
)
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.run.ablation import References, compare, read_ablation
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.shown_arms import shown_arms
from tir_kernels.fewshot.run.statistics import episodes_needed
from tir_kernels.fewshot.run.tracked import Series, Track, TrackFile

ARMS = ("lora", "tir", "random", "zero-shot")
CORRECT = {"lora": [1, 2, 3, 2], "tir": [2, 3, 3, 3], "random": [1, 2, 3, 3], "zero-shot": [1] * 4}


@pytest.fixture
def run(tmp_path):
    journal = Journal(tmp_path / "episodes.jsonl")
    tracks = TrackFile(journal.path)
    for arm in ARMS:
        for episode, correct in enumerate(CORRECT[arm]):
            if arm != "zero-shot":
                base = 0.1 * (episode + 1) * (2 if arm == "tir" else 1)
                values = [[0.5, None, 0.0], [9.0, 9.0, 9.0], [0.5 + base, 1.0, base]]
                chance = [[0.0] * 3]
                series = [
                    Series("sink-ratio", "ratio", [0, 1, 2], chance, values),
                    Series("cka", "likeness", [0, 1, 2], chance, values),
                    Series("top-patch", "once", [0, 1, 2], chance, [[None] * 3] * 3),
                ]
                tracks.append(Track(episode, arm, [0, 1, 2], series))
            journal.append(record(episode, arm, correct=correct, accuracy=correct / 4))
    journal.append(record(4, "tir", **FAILED))
    journal.close()
    tracks.close()
    write_settings(tmp_path)
    return tmp_path


def write_settings(folder):
    arms = {arm: {"method": "tir" if arm == "random" else arm} for arm in ARMS}
    content = {"episodes": 5, "settings": {"arms": arms}}
    (folder / "settings.json").write_text(json.dumps(content))


def test_accuracy_is_compared_with_the_baseline(run):
    ablation = read_ablation(run, ARMS, "lora")
    by_arm = {own.arm: own for own in ablation.accuracy}
    assert list(by_arm) == list(ARMS)
    assert by_arm["lora"].difference is None
    tir = by_arm["tir"]
    assert tir.value.mean == pytest.approx(11 / 16)
    assert tir.difference.mean == pytest.approx(3 / 16)
    pairs = [a / 4 for a in CORRECT["tir"]], [a / 4 for a in CORRECT["lora"]]
    assert tir.p == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    others = sorted(own.p for own in ablation.accuracy if own.p is not None)
    assert tir.holm == pytest.approx(max((3 - i) * p for i, p in enumerate(others) if p <= tir.p))
    assert tir.episodes_needed == episodes_needed(tir.difference, significance=0.05 / 3)
    assert tir.episodes_needed > episodes_needed(tir.difference)


def test_changes_are_last_minus_first_over_blocks_that_have_both(run):
    ablation = read_ablation(run, ARMS, "lora")
    assert [change.name for change in ablation.changes] == ["ratio", "likeness"]
    change = ablation.changes[0]
    assert [own.arm for own in change.arms] == ["lora", "tir", "random"]
    lora, tir, random = change.arms
    assert lora.value.mean == pytest.approx(0.25)
    assert tir.value.mean == pytest.approx(0.5)
    assert tir.difference.mean == pytest.approx(0.25)
    assert (random.difference.mean, random.p, random.holm) == (pytest.approx(0.0), 1.0, 1.0)


def test_tuned_arms_stand_beside_the_probe_on_the_episodes_that_both_have():
    values = {
        "lora": {0: 0.5, 1: 0.75, 2: 0.75},
        "probe": {0: 0.25, 1: 0.25},
        "zero": {0: 0.25, 2: 0.5},
    }
    methods = {"lora": "lora", "probe": "linear-probe", "zero": "zero-shot"}
    settings = {"arms": {arm: {"method": method} for arm, method in methods.items()}}
    references = References.among(shown_arms(settings, list(methods)), "lora")
    assert references == References("lora", "probe", ("probe", "zero"))
    lora, probe, zero = compare(values, references)
    assert (lora.beyond_probe.mean, lora.beyond_probe.episodes) == (0.375, 2)
    assert probe.beyond_probe is None
    assert zero.beyond_probe is None
    assert (zero.difference.mean, zero.difference.episodes) == (-0.25, 2)
    alone = compare(values, References("lora"))
    assert [own.beyond_probe for own in alone] == [None] * 3


@pytest.mark.slow
def test_what_a_corrected_test_does_not_separate_needs_more_episodes():
    """Whatever the differences: else a page would ask for fewer episodes than there are."""
    draw = random.Random(0)
    undecided = 0
    for _ in range(200):
        size = draw.uniform(0, 0.1)
        values = {"lora": dict.fromkeys(range(9), 0.5)}
        for arm in "abcde":
            values[arm] = {episode: draw.gauss(0.5 + size, 0.06) for episode in range(9)}
        for own in compare(values, References("lora")):
            if own.p is not None and not own.is_separated:
                undecided += own.p < 0.05
                assert own.episodes_needed is None or own.episodes_needed > 9
    assert undecided > 20


def test_the_tables_are_printed(run):
    text = io.StringIO()
    print_ablation(read_ablation(run, ARMS, "lora"), Console(file=text, width=120))
    for part in ("+18.8 ± ", "ratio: last step minus first", "No tuned arm is separated"):
        assert part in text.getvalue(), part
    assert "likeness" not in text.getvalue()
    assert text.getvalue().count("Mean ± 95 %") == 1


def test_a_run_without_tracks_has_accuracies_alone(tmp_path):
    journal = Journal(tmp_path / "episodes.jsonl")
    journal.append(record(0, "lora"))
    journal.close()
    write_settings(tmp_path)
    ablation = read_ablation(tmp_path, ARMS, "lora")
    assert ablation.changes == ()
    assert [own.value.episodes for own in ablation.accuracy] == [1, 0, 0, 0]
    print_ablation(ablation, Console(file=io.StringIO()))


def test_the_arms_differ_in_one_option_each():
    arms = {arm.name: arm.method for arm in make_arms(ablation_methods(), ablation_arms(), {})}
    assert len(arms) == 13
    published = vars(arms[PUBLISHED])
    for name, method in arms.items():
        if name.startswith(f"{PUBLISHED}@"):
            changed = {key for key, value in vars(method).items() if value != published[key]}
            assert len(changed) == 1, name
    assert arms[BASELINE].steps == arms[PUBLISHED].steps
