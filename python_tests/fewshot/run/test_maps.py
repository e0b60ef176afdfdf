"""Arrays for pictures: written whole, read in the order of the run."""

import numpy as np
import pytest
from fewshot.run.test_journal import record

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.maps import Maps, read_maps, write_maps


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
    assert read_maps(run) == []
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


def test_damaged_file_is_named(run):
    write_maps(run, 0, maps(0, "tir"))
    path = run / "maps" / "0-0.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FewShotError, match=r"0-0\.npz is damaged"):
        read_maps(run)
