"""The folder of the cache: where it is, and what happens where it can't be used."""

import contextlib
import os
import pwd
import resource
from pathlib import Path

import pytest
import torch
from cached_images import command
from fake_engine import run_main

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data import cache as image_cache
from tir_kernels.fewshot.data.cache import default_cache_folder, open_cache


def test_a_folder_that_cannot_be_written_is_told_once(setting, tmp_path):
    (tmp_path / "file").write_text("")
    setting.folder = tmp_path / "file" / "cache"
    reader = setting.reader()
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert torch.equal(reader(0, 1), setting.without_cache()(0, 1))
    (notice,) = setting.notices
    assert notice.startswith(f"cache: can't keep images in {setting.own_folder}: ")
    assert "Not a directory" in notice
    assert "going on without" in notice
    assert torch.equal(reader.all(), setting.without_cache().all())
    assert reader.preprocess.decoded == 6


@pytest.mark.parametrize("name", ["nul\0byte", "n" * 300])
def test_a_folder_of_no_possible_name_is_told_once(setting, tmp_path, name):
    setting.folder = tmp_path / name
    assert torch.equal(setting.reader().all(), setting.without_cache().all())
    (notice,) = setting.notices
    assert "can't keep images in" in notice
    assert "\0" not in notice


@contextlib.contextmanager
def file_size_limit(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writing_fails_midway(setting):
    plain = setting.without_cache().all()
    reader = setting.reader()
    with file_size_limit(200):
        pixels = reader.all()
    assert torch.equal(pixels, plain)
    (notice,) = setting.notices
    assert "File too large" in notice
    assert setting.files == []


def test_a_full_disk_is_not_filled_further(setting, monkeypatch):
    monkeypatch.setattr(image_cache, "_ROOM_BYTES", 2**80)
    reader = setting.reader()
    assert torch.equal(reader.all(), setting.without_cache().all())
    (notice,) = setting.notices
    assert "No space left" in notice
    assert setting.files == []
    assert reader.preprocess.decoded == 5


def test_a_folder_that_can_only_be_read_serves(setting, monkeypatch):
    plain = setting.without_cache().all()
    setting.reader().all()
    open_, changes = os.open, os.O_CREAT | os.O_WRONLY | os.O_RDWR

    def open_to_read(path, flags, *arguments, **options):
        if flags & changes:
            raise PermissionError(13, "Permission denied")
        return open_(path, flags, *arguments, **options)

    monkeypatch.setattr(image_cache.os, "open", open_to_read)
    reader = setting.reader()
    assert torch.equal(reader.all(), plain)
    assert reader.preprocess.decoded == 0
    assert setting.notices == []
    assert torch.equal(reader(0, 1), setting.without_cache()(0, 1))
    (notice,) = setting.notices
    assert "Permission denied; going on without" in notice


def test_default_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_folder() == Path("/x/tir_kernels/images")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "tir_kernels" / "images"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_folder() == Path.home() / ".cache" / "tir_kernels" / "images"


@pytest.fixture
def no_home(monkeypatch):
    """As for a user number that no file names, in a container."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_folder_images_are_not_kept(no_home):
    assert default_cache_folder() is None
    notices = []
    assert open_cache(None, (3, 8, 8), notify=notices.append) is None
    (notice,) = notices
    assert "no home folder is known" in notice
    assert "pass cache=DIR" in notice
    with pytest.raises(FewShotError, match=r"cache: .*no home folder.*~/images.*a whole path"):
        open_cache("~/images", (3, 8, 8), notify=notices.append)


@pytest.mark.parametrize("options", [[], ["--no-cache"], ["--cache", "kept"]])
def test_the_command_line_needs_no_home_folder(no_home, make_images, tmp_path, capsys, options):
    options = [str(tmp_path / option) if option == "kept" else option for option in options]
    assert run_main(command(make_images(), tmp_path / "run", *options)) == 0
    assert ("no home folder is known" in capsys.readouterr().err) == (not options)
    assert (tmp_path / "kept").exists() == (len(options) == 2)


def test_the_command_line_keeps_images_or_not(make_images, tmp_path):
    root = make_images()
    assert run_main(command(root, tmp_path / "1", "--no-cache")) == 0
    assert not default_cache_folder().exists()
    assert run_main(command(root, tmp_path / "2")) == 0
    kept = len(list(default_cache_folder().glob("*/*.image")))
    assert 12 <= kept <= 24  # of 48: those of two episodes
    assert run_main(command(root, tmp_path / "3", "--cache", str(tmp_path / "kept"))) == 0
    assert len(list((tmp_path / "kept").glob("*/*.image"))) == kept
