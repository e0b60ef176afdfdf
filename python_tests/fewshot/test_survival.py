"""Runs that are killed, starved or damaged lose nothing, and say what is wrong."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import fake_engine
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.folder import read_run
from tir_kernels.fewshot.run.journal import journal_paths

pytestmark = pytest.mark.slow

KILLS = 20

forking = multiprocessing.get_context("fork")


class Run:
    """A command line on small images, and what it gives when nothing happens to it."""

    def __init__(self, root, folder, episodes):
        self.root = root
        self.folder = folder / "out"
        self._reference = folder / "reference"
        small = "--model fake --ways=3 --shots=2 --queries=4 --steps=2 --backend=reference"
        options = ["run", "--data", str(root), f"--episodes={episodes}", *small.split()]
        self.arguments = [*options, "--out", str(self.folder)]
        # Now rather than at the end, so that forks of this process have all modules.
        assert fake_engine.run_main([*options, "--out", str(self._reference)]) == 0

    def assert_complete(self):
        """All records are as in an uninterrupted run, and none was written twice."""
        expected = timeless(read_run(self._reference))
        assert timeless(read_run(self.folder)) == expected
        assert self.lines() == len(expected)
        summaries = [
            json.loads((folder / "summary.json").read_text())
            for folder in (self.folder, self._reference)
        ]
        for summary in summaries:
            for entry in summary["arms"]:
                del entry["seconds_per_step"]
        assert summaries[0] == summaries[1]

    def lines(self):
        """Lines in all journals, torn ones left out."""
        return sum(path.read_bytes().count(b"\n") for path in self.journals())

    def torn(self):
        """Journals that end in the middle of a line."""
        contents = [path.read_bytes() for path in self.journals()]
        return sum(content != b"" and not content.endswith(b"\n") for content in contents)

    def journals(self):
        return journal_paths(self.folder) if self.folder.exists() else []


@pytest.fixture
def make_run(make_images, tmp_path):
    return lambda episodes: Run(make_images(), tmp_path, episodes)


def timeless(records):
    return [replace(record, seconds=0, seconds_per_step=None) for record in records]


def slow_disk(before_write=lambda: None):
    """A journal's lines are written piece by piece, with time to be killed before each of them."""
    write = os.write

    def write_half(file, content):
        if len(content) > 100:
            content = content[: (len(content) + 1) // 2]
        time.sleep(0.004)
        before_write()
        return write(file, content)

    return mock.patch("tir_kernels.fewshot.run.journal.os.write", write_half)


def wait_until(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start(function, *arguments):
    def run():
        # A shell's background jobs, tests among them, start with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function(*arguments)

    process = forking.Process(target=run)
    process.start()
    return process


def test_killed_over_and_over(make_run):
    run = make_run(episodes=100)
    delays = random.Random(0)

    def live(before):
        def hang():
            # Lest the run end before a late signal comes.
            if run.lines() == before + 9:
                time.sleep(600)

        with slow_disk(hang):
            os._exit(fake_engine.run_main(run.arguments))

    torn = 0
    for _ in range(KILLS):
        before = run.lines()
        process = start(live, before)
        wait_until(lambda before=before: run.lines() > before, process)
        time.sleep(delays.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += run.torn()
    assert torn > 0, "no kill hit the middle of a line"
    assert fake_engine.run_main(run.arguments) == 0
    run.assert_complete()


def test_workers_are_killed_over_and_over(make_run, tmp_path):
    run = make_run(episodes=100)
    restarts = 6

    def die_young():
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        rank = int(os.environ["RANK"])
        (tmp_path / f"attempt{attempt}.{rank}").touch()
        if attempt == restarts:
            return
        writes_left = random.Random(attempt).randint(2, 20)
        is_writing = tmp_path / f"victim{attempt}"

        def count_down():
            nonlocal writes_left
            writes_left -= 1
            if rank != attempt % 3:
                # So that there is something left for the victim to do, however late it begins.
                wait_until(is_writing.exists)
            elif writes_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            else:
                is_writing.touch()

        slow_disk(count_down).start()

    fake_engine.run_shared(run.arguments, restarts=restarts, before=die_young)
    assert len(list(tmp_path.glob("attempt*"))) == 3 * (restarts + 1)
    assert len(run.journals()) == 3
    run.assert_complete()


def in_group(rank, count=2):
    """What ``torchrun`` tells a worker."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "GROUP_WORLD_SIZE": 1}
    values |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    return mock.patch.dict(os.environ, {name: str(value) for name, value in values.items()})


def test_the_living_run_what_the_dead_left(make_run):
    run = make_run(episodes=12)

    def hang():
        if run.lines() and run.torn():
            time.sleep(600)

    def work_and_hang():
        with in_group(1), slow_disk(hang):
            fake_engine.run_main([*run.arguments, "--parallel-episodes=3"])

    def work():
        with in_group(0), slow_disk(lambda: wait_until(lambda: run.lines() and run.torn())):
            os._exit(fake_engine.run_main([*run.arguments, "--parallel-episodes=3"]))

    first = start(work)
    second = start(work_and_hang)
    # The second holds a piece of three episodes, and has written one result and half of another.
    wait_until(lambda: run.torn() == 1 and run.lines() == 19, first)
    second.kill()
    second.join()
    first.join(30)
    assert first.exitcode == 0
    run.assert_complete()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_shared_run_is_interrupted(make_run, number, tmp_path, capfd):
    run = make_run(episodes=60)
    capfd.readouterr()

    def work(rank):
        writes = itertools.count()

        def hang():
            if next(writes) == 30:
                (tmp_path / f"hangs{rank}").touch()
                time.sleep(600)

        with in_group(rank, 3), slow_disk(hang):
            os._exit(fake_engine.run_main(run.arguments))

    workers = [start(work, rank) for rank in range(3)]
    wait_until(lambda: len(list(tmp_path.glob("hangs*"))) == 3)
    for worker in workers:
        os.kill(worker.pid, number)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 130
    assert capfd.readouterr().err.count("interrupted; what is finished is kept.") == 1
    assert 0 < len(read_run(run.folder)) < 120
    assert fake_engine.run_main(run.arguments) == 0
    run.assert_complete()


def errors_in(text):
    return [line for line in text.splitlines() if line.startswith("tir-finetune")]


def test_what_all_processes_meet_is_told_once(make_run, capfd):
    run = make_run(episodes=2)
    capfd.readouterr()
    with pytest.raises(ChildFailedError) as caught:
        fake_engine.run_shared([*run.arguments, "--data", "/none"])
    assert caught.value.get_first_failure()[1].exitcode == 2
    (line,) = errors_in(capfd.readouterr().err)
    assert line.startswith("tir-finetune[0]: error: --data: /none does not exist")


def test_what_one_process_meets_is_told_by_it(make_run, capfd):
    run = make_run(episodes=30)
    capfd.readouterr()

    def fill_the_disk_of_one():
        writes = []

        def fill():
            writes.append(None)
            if os.environ["RANK"] == "0":
                wait_until(lambda: sum(path.stat().st_size for path in run.journals()[1:]))
            elif len(writes) > 10:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        slow_disk(fill).start()

    with pytest.raises(ChildFailedError):
        fake_engine.run_shared(run.arguments, processes=2, before=fill_the_disk_of_one)
    told = [line for line in errors_in(capfd.readouterr().err) if "error" in line]
    assert len(told) == 1
    assert told[0].startswith("tir-finetune[1]: error: can't write ")
    assert (
        "episodes.1.jsonl: [Errno 28] No space left on device; what is finished is kept" in told[0]
    )
    # While it waited for others to tell it, the other process has run the rest, or a part of it.
    assert read_run(run.folder)
    fake_engine.run_shared(run.arguments, processes=2)
    run.assert_complete()


def limit_file_size(size):
    """As on a disk that becomes full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [600, 1500])
def test_full_disk(make_run, size, capfd):
    run = make_run(episodes=10)
    capfd.readouterr()

    def live():
        limit_file_size(size)
        os._exit(fake_engine.run_main([*run.arguments, "--no-cache"]))

    process = start(live)
    process.join(60)
    assert process.exitcode == 2
    (line,) = errors_in(capfd.readouterr().err)
    assert "error: can't write " in line
    assert "[Errno 27] File too large" in line
    assert len(read_run(run.folder)) == run.lines() == (5 if size == 1500 else 0)
    assert run.torn() == 0
    assert fake_engine.run_main(run.arguments) == 0
    run.assert_complete()


def test_damaged_journals_of_a_shared_run(make_run, capsys):
    run = make_run(episodes=9)
    assert fake_engine.run_main(run.arguments) == 0
    journals = [run.folder / name for name in ("episodes.jsonl", "episodes.1.jsonl")]
    journals.append(run.folder / "episodes.2.jsonl")
    written = journals[0].read_bytes().splitlines(keepends=True)
    for rank, path in enumerate(journals):
        path.write_bytes(b"".join(written[rank::3])[:-20])
    assert run.torn() == 3
    whole = journals[2].read_bytes()
    lines = whole.split(b"\n")
    journals[2].write_bytes(b"\n".join([lines[0][:-3], *lines[1:]]))
    capsys.readouterr()
    assert fake_engine.run_main(run.arguments) == 2
    (line,) = errors_in(capsys.readouterr().err)
    assert f"line 1 of {journals[2]} is damaged" in line
    journals[2].write_bytes(whole)
    # One process repairs its own journal and leaves the others', which are read up to the tear.
    assert fake_engine.run_main(run.arguments) == 0
    assert run.torn() == 2
    run.assert_complete()
    fake_engine.run_shared(run.arguments)
    assert run.torn() == 0
    run.assert_complete()


def test_images_vanish_and_come_back(make_run, capsys):
    run = make_run(episodes=12)
    away = run.root.with_name("away")
    finetune, calls = fake_engine.fake_finetune, []

    def unmount(*arguments, **options):
        calls.append(None)
        if len(calls) == 3:
            run.root.rename(away)
        return finetune(*arguments, **options)

    capsys.readouterr()
    with mock.patch.object(fake_engine, "fake_finetune", unmount):
        assert fake_engine.run_main([*run.arguments, "--no-cache"]) == 2
    (line,) = errors_in(capsys.readouterr().err)
    assert f"can't read the image {run.root}/" in line
    assert 3 <= len(read_run(run.folder)) < 24
    assert fake_engine.run_main([*run.arguments, "--no-cache"]) == 2
    assert f"--data: {run.root} does not exist" in capsys.readouterr().err
    away.rename(run.root)
    assert fake_engine.run_main([*run.arguments, "--no-cache"]) == 0
    run.assert_complete()


def test_three_processes_of_torchrun_give_the_numbers_of_one(
    make_images, tmp_path, tiny_model_folder
):
    """The real engine, the real command line, and other groups of episodes."""
    small = "--ways=3 --shots=2 --queries=4 --episodes=6 --steps=4 --lora-lr=2e-3"
    options = ["run", "--data", str(make_images()), "--model", str(tiny_model_folder)]
    options += [*small.split(), "--method=tir", "--method=lora", "--method=zero-shot"]
    assert main([*options, "--out", str(tmp_path / "one"), "--parallel-episodes=3"]) == 0
    shared = [*options, "--out", str(tmp_path / "three")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
    done = subprocess.run(
        [*launch, "-m", "tir_kernels.fewshot", *shared],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accuracy, mean") == 1
    assert "18/18: episode" in done.stderr
    assert len(journal_paths(tmp_path / "three")) == 3
    one, three = (read_run(tmp_path / name) for name in ("one", "three"))
    assert [record.key for record in three] == [record.key for record in one]
    assert len(one) == 18
    for ours, theirs in zip(three, one, strict=True):
        assert ours.correct == theirs.correct
        assert ours.support_accuracy == theirs.support_accuracy
        if theirs.arm != "zero-shot":
            assert ours.final_loss == pytest.approx(theirs.final_loss, abs=1e-4)
    # One process may go on with what three began, and has nothing to do here.
    assert main([*shared, "--device", "cpu"]) == 0
    assert read_run(tmp_path / "three") == three
