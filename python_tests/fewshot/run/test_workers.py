"""The processes that share a run: their places, their folder, and the episodes they hold."""

import multiprocessing
import os
import socket
import time

import pytest

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.run.lock import RunLock
from tir_kernels.fewshot.run.workers import Place

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job7",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "GROUP_WORLD_SIZE": "2",
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "16",
}

forking = multiprocessing.get_context("fork")


@pytest.fixture
def torchrun(monkeypatch):
    def started(**changes):
        for name, value in (TORCHRUN | changes).items():
            monkeypatch.setenv(name, value)
        return Place.of_this_process()

    return started


def test_places_by_torchrun(torchrun):
    place = torchrun()
    assert place == Place("torchrun job7 node1:29500", rank=9, count=16, local_rank=1)
    assert not place.is_first
    assert place.label == "[9]"
    assert torchrun(RANK="0", LOCAL_RANK="0").group == place.group
    assert torchrun(RANK="0", LOCAL_RANK="0").is_first
    assert torchrun(MASTER_PORT="1").group != place.group
    assert torchrun(GROUP_WORLD_SIZE="1").group.endswith(f" on {socket.gethostname()}")


def test_a_process_alone_is_a_group_of_its_own():
    one, other = Place.of_this_process(), Place.of_this_process()
    assert one.is_first
    assert one.count == 1
    assert one.label == ""
    assert one.group != other.group
    assert f"process {os.getpid()} on {socket.gethostname()}" in one.group


def test_each_process_has_its_own_gpu(torchrun):
    assert torchrun().own_device("cuda") == "cuda:1"
    assert torchrun().own_device("cuda:0") == "cuda:0"
    assert torchrun().own_device("cpu") == "cpu"
    assert Place("alone").own_device("cuda") == "cuda"


class Other:
    """A process in the folder that does what it is told."""

    def __init__(self, path, place):
        self._pipe, end = forking.Pipe()
        self.process = forking.Process(target=self._live, args=(path, place, end))
        self.process.start()

    @staticmethod
    def _live(path, place, pipe):
        try:
            lock = RunLock(path, place, patience=30)
        except FewShotError as error:
            pipe.send(str(error))
            return
        pipe.send("inside")
        while True:
            name, *arguments = pipe.recv()
            if name == "journal":
                pipe.send(lock.journal_number())
                continue
            with lock.episodes(*arguments) as held:
                pipe.send(held)
                pipe.recv()
            pipe.send("released")

    def hear(self):
        assert self._pipe.poll(30)
        return self._pipe.recv()

    def ask(self, *words):
        self._pipe.send(words)
        return self.hear()

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture
def others(tmp_path):
    """Starts processes, each in a place; they end with the test."""
    started = []

    def start(place):
        started.append(Other(tmp_path / "run" / ".lock", place))
        return started[-1]

    yield start
    for other in started:
        other.kill()


@pytest.mark.slow
def test_the_others_wait_for_the_first(others, tmp_path):
    follower = others(Place("group", 1, 2))
    time.sleep(0.5)
    assert not (tmp_path / "run").exists()
    assert others(Place("group", 0, 2)).hear() == "inside"
    assert follower.hear() == "inside"


def test_another_group_is_refused_while_one_is_inside(others):
    first, follower = others(Place("group", 0, 2)), others(Place("group", 1, 2))
    assert first.hear() == follower.hear() == "inside"
    text = "another process is running in "
    assert text in others(Place("other", 0, 2)).hear()
    # The group is inside as long as one of its processes is.
    first.kill()
    assert "(group); wait for it" in others(Place("other", 0, 2)).hear()
    assert others(Place("group", 0, 2)).hear() == "inside"
    follower.kill()
    assert text in others(Place("other", 0, 2)).hear()


@pytest.mark.slow
def test_a_folder_is_free_when_its_group_is_gone(others, tmp_path):
    first, follower = others(Place("group", 0, 2)), others(Place("group", 1, 2))
    assert first.hear() == follower.hear() == "inside"
    first.kill()
    follower.kill()
    assert others(Place("other", 0, 2)).hear() == "inside"
    # A late process of the old group is not let in.
    with pytest.raises(FewShotError, match="did not come to"):
        RunLock(tmp_path / "run" / ".lock", Place("group", 1, 2), patience=0.3)


def test_a_folder_that_is_not_shared_is_noticed(tmp_path):
    with pytest.raises(FewShotError, match=r"the first of the 2 processes did not come to .*share"):
        RunLock(tmp_path / ".lock", Place("group", 1, 2), patience=0.3)
    (tmp_path / ".lock").write_text("the group of an earlier run")
    with pytest.raises(FewShotError, match="did not come"):
        RunLock(tmp_path / ".lock", Place("group", 1, 2), patience=0.3)


def test_an_episode_is_held_once(others):
    first, follower = others(Place("group", 0, 2)), others(Place("group", 1, 2))
    assert first.hear() == follower.hear() == "inside"
    assert first.ask("episodes", [3, 4, 5, 6], 2) == [3, 4]
    assert follower.ask("episodes", [3, 4, 5, 6], 3) == [5, 6]
    assert first.ask("on") == "released"
    assert first.ask("episodes", [3, 4, 5, 6], 9) == [3, 4]
    follower.kill()
    assert first.ask("on") == "released"
    assert first.ask("episodes", [3, 4, 5, 6], 9) == [3, 4, 5, 6]


def test_a_journal_has_one_writer(others):
    places = [Place("group", rank, 2) for rank in (0, 1, 1)]
    first, follower, again = (others(place) for place in places)
    assert [other.hear() for other in (first, follower, again)] == ["inside"] * 3
    assert first.ask("journal") == 0
    assert follower.ask("journal") == 1
    assert again.ask("journal") == 3
    follower.kill()
    newcomer = others(Place("group", 1, 2))
    assert newcomer.hear() == "inside"
    assert newcomer.ask("journal") == 1


@pytest.mark.parametrize("missing", ["MASTER_PORT", "GROUP_WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_a_part_of_torchruns_environment_is_refused(monkeypatch, missing):
    names = ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE"]
    for name in [*names, "RANK", "WORLD_SIZE", "LOCAL_RANK"]:
        monkeypatch.setenv(name, "1")
    assert Place.of_this_process().rank == 1
    monkeypatch.setenv(missing, "one")
    if missing in ("MASTER_PORT", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(missing)
    with pytest.raises(FewShotError, match=r"not all else that torchrun sets .*unset TORCHELASTIC"):
        Place.of_this_process()
