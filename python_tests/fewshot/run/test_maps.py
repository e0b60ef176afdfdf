"""Arrays for pictures: written whole, read in the order of the run."""

import gc
import weakref

import numpy as np
import pytest
from fewshot.run.test_journal import record

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.run import maps as reading
from tir_kernels.fewshot.run.folder import read_run
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.maps import Maps, RunMaps, read_maps, write_maps


def maps(episode, arm):
    random = np.random.default_rng(episode)
    half = {
        name: random.normal(size=shape).astype(np.float16)
        for name, shape in {
            "relevance": (4, 2, 6),
            "weights": (4, 6),
            "received_before": (4, 6),
            "received_after": (4, 6),
            "tokens_before": (3, 4, 8),
            "tokens_after": (3, 4, 8),
        }.items()
    }
    return Maps(
        episode=episode,
        arm=arm,
        class_names=["a cat", "ein Bär"],
        labels=np.array([0, 0, 1, 1]),
        images=random.integers(0, 256, (4, 8, 8, 3), np.uint8),
        grid=(2, 3),
        counts=random.integers(0, 3, (4, 6), np.uint8),
        **half,
    )


def assert_equal(one, other):
    for name in Maps._fields:
        left, right = getattr(one, name), getattr(other, name)
        assert type(left) is type(right), name
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, name
            assert np.array_equal(left, right), name
        else:
            assert left == right, name


@pytest.fixture
def run(tmp_path):
    journal = Journal(tmp_path / "episodes.jsonl")
    for episode in (0, 1):
        for arm in ("tir", "lora"):
            journal.append(record(episode, arm))
    journal.close()
    return tmp_path


def test_round_trip_in_the_order_of_the_run(run):
    assert list(read_maps(run)) == []
    written = [maps(0, "lora"), maps(0, "tir"), maps(1, "lora")]
    for own in reversed(written):
        write_maps(run, ("tir", "lora").index(own.arm), own)
    for one, other in zip(read_maps(run), written, strict=True):
        assert_equal(one, other)
    assert {path.name for path in (run / "maps").iterdir()} == {"0-0.npz", "0-1.npz", "1-1.npz"}


def test_the_last_ones_count_and_only_those_of_finished_episodes(run):
    write_maps(run, 0, maps(0, "tir"))
    changed = maps(0, "tir")._replace(class_names=["x", "y"])
    write_maps(run, 0, changed)
    write_maps(run, 0, maps(7, "tir"))
    (read,) = read_maps(run)
    assert_equal(read, changed)


def test_files_are_read_when_they_are_asked_for_and_kept_nowhere(run, monkeypatch):
    for arm_index, arm in enumerate(("tir", "lora")):
        write_maps(run, arm_index, maps(0, arm))
    opened = []
    read = reading._read
    monkeypatch.setattr(reading, "_read", lambda path: opened.append(path.name) or read(path))
    found = RunMaps(run, read_run(run))
    assert list(found) == [(0, "lora"), (0, "tir")]
    assert opened == []
    first = weakref.ref(found[0, "tir"].images)
    assert opened == ["0-0.npz"]
    gc.collect()
    assert first() is None
    assert (1, "tir") not in found


@pytest.mark.parametrize("damage", [lambda raw: raw[:-100], lambda raw: b"", lambda raw: b"x" * 9])
def test_damaged_file_is_named(run, damage):
    write_maps(run, 0, maps(0, "tir"))
    path = run / "maps" / "0-0.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FewShotError, match=r"0-0\.npz is damaged"):
        list(read_maps(run))


def test_damage_inside_a_file_is_named_too(run):
    write_maps(run, 0, maps(0, "tir"))
    path = run / "maps" / "0-0.npz"
    raw = bytearray(path.read_bytes())
    place = raw.index(b"images.npy") + 60
    raw[place : place + 40] = bytes(40)
    path.write_bytes(raw)
    with pytest.raises(FewShotError, match=r"0-0\.npz is damaged"):
        list(read_maps(run))
