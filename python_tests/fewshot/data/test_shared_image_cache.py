"""A cache that others can reach too: several processes at once, and other users."""

import json
import multiprocessing
import os
import signal
import stat
import time

import pytest
import torch
from cached_images import Counting, Setting, command
from fake_engine import run_main
from small_images import write_images

from tir_kernels.fewshot.data import cache as image_cache

FORK = multiprocessing.get_context("fork")  # at once, where a new interpreter takes seconds


def read_all(setting, answers):
    """What a process of the test below does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(2)
    reader = setting.reader(Counting(seconds=0.05))
    total = int(reader.all().long().sum())
    answers.put((reader.preprocess.decoded, total, len(setting.notices)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGKILL, signal.SIGINT])
def test_processes_at_once_and_what_a_stopped_one_leaves(tmp_path, number):
    setting = Setting(write_images(tmp_path / "images", {"a": 40}), tmp_path / "cache")
    answers = FORK.Queue()
    stopped, other = (FORK.Process(target=read_all, args=(setting, answers)) for _ in range(2))
    stopped.start()
    if number is not None:
        deadline = time.monotonic() + 120
        while len(setting.files) < 5:
            assert stopped.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(stopped.pid, number)
    other.start()
    expected = int(setting.without_cache().all().long().sum())
    for _ in range(1 if number else 2):
        decoded, total, notices = answers.get(timeout=120)
        assert decoded <= (36 if number else 40)
        assert (total, notices) == (expected, 0)
    for process in (stopped, other):
        process.join(timeout=120)
    assert other.exitcode == 0
    assert (stopped.exitcode == 0) == (number is None)
    assert len([path for path in setting.files if path.suffix == ".image"]) == 40
    last = setting.reader()
    assert int(last.all().long().sum()) == expected
    assert last.preprocess.decoded == 0


@pytest.fixture
def setting(make_images, tmp_path):
    """A cache with all images of a class in it."""
    setting = Setting(make_images({"a": 3}), tmp_path / "cache")
    setting.reader().all()
    return setting


def assert_decoded_again(setting, images, notice):
    reader = setting.reader()
    for _ in range(2):
        assert torch.equal(reader.all(), setting.without_cache().all())
    assert reader.preprocess.decoded == images  # once, then from memory
    (told,) = setting.notices
    assert notice in told


def test_what_is_created_is_for_the_user_alone(setting):
    assert stat.S_IMODE(setting.own_folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in setting.files} == {0o600}


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_files_that_others_may_write_are_not_used_nor_replaced(setting, mode):
    path = setting.files[1]
    path.chmod(mode)
    content = path.read_bytes()
    assert_decoded_again(setting, 1, f"{path} can be written by other users, so it is not used")
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_not_used(setting, mode):
    setting.own_folder.chmod(mode)
    before = {path: path.stat().st_mtime_ns for path in setting.files}
    assert_decoded_again(setting, 3, "the folder can be written by other users")
    assert {path: path.stat().st_mtime_ns for path in setting.files} == before


def owned_by(number, is_meant):
    """``os.fstat`` for which another user owns some files."""
    fstat = os.fstat

    def status(descriptor):
        real = fstat(descriptor)
        if not is_meant(real.st_mode):
            return real
        return os.stat_result((*real[:4], number, *real[5:]))

    return status


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_belongs_to_another_user_is_not_used(setting, monkeypatch, is_folder):
    is_meant = stat.S_ISDIR if is_folder else stat.S_ISREG
    before = {path: path.stat().st_ino for path in setting.files}
    with monkeypatch.context() as patch:
        patch.setattr(image_cache.os, "fstat", owned_by(os.geteuid() + 7, is_meant))
        assert_decoded_again(setting, 3, "belongs to another user")
    assert {path: path.stat().st_ino for path in setting.files} == before


def test_files_of_root_are_used(setting, monkeypatch):
    monkeypatch.setattr(image_cache.os, "fstat", owned_by(0, lambda mode: True))
    reader = setting.reader()
    reader.all()
    assert reader.preprocess.decoded == 0
    assert setting.notices == []


@pytest.mark.parametrize("is_good", [True, False])
def test_links_are_not_followed(setting, tmp_path, is_good):
    path, target = setting.files[1], tmp_path / "precious"
    if is_good:
        path.rename(target)
    else:
        path.unlink()
        target.write_text("a file of the user's own")
    content = target.read_bytes()
    path.symlink_to(target)
    assert_decoded_again(setting, 1, f"{path} is a link, so it is not used")
    assert target.read_bytes() == content
    assert path.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_only_regular_files_are_read_and_nothing_waits(setting, make):
    path = setting.files[1]
    path.unlink()
    make(path)
    assert_decoded_again(setting, 1, f"{path} is not a regular file, so it is not used")
    assert path.exists()


def test_the_folder_itself_is_no_link(setting, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    setting.own_folder.rename(elsewhere)
    setting.own_folder.symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    assert_decoded_again(setting, 3, "the folder is a link")
    assert sorted(elsewhere.iterdir()) == before
    # A link to the whole cache is the user's own affair.
    setting.own_folder.unlink()
    elsewhere.rename(setting.own_folder)
    setting.folder.rename(tmp_path / "large disk")
    setting.folder.symlink_to(tmp_path / "large disk")
    reader = setting.reader()
    reader.all()
    assert reader.preprocess.decoded == 0


def test_a_run_on_a_cache_that_others_may_write(make_images, tmp_path, capsys):
    """The accuracies are those of the images, whatever others wrote into the cache."""
    root, cache = make_images(), tmp_path / "cache"
    assert run_main(command(root, tmp_path / "1", "--cache", str(cache))) == 0
    (folder,) = cache.iterdir()
    # Files of an own shape and checksum, as whoever knows the program could write them.
    for path in folder.iterdir():
        pixels = bytes(3 * 8 * 8)
        path.write_bytes(image_cache._head(path.stem, True, 0, pixels) + pixels)
    folder.chmod(0o777)
    assert run_main(command(root, tmp_path / "2", "--cache", str(cache))) == 0
    assert capsys.readouterr().err.count("the folder can be written by other users") == 1
    first, second = (
        [json.loads(line) for line in (tmp_path / run / "episodes.jsonl").read_text().splitlines()]
        for run in "12"
    )
    assert [line["accuracy"] for line in first] == [line["accuracy"] for line in second]


def test_a_file_cut_short_while_it_is_read_is_decoded_again(setting, monkeypatch):
    read_into = image_cache._read_into

    def cut_and_read(file, content):
        os.truncate(setting.files[0], 90)
        return read_into(file, content)

    monkeypatch.setattr(image_cache, "_read_into", cut_and_read)
    reader = setting.reader()
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert len(setting.notices) == 1
