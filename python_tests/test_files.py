"""Reading the files that a user names."""

import os
import pwd
from pathlib import Path

import pytest

from tir_kernels.errors import FewShotError
from tir_kernels.files import expand_user, open_regular, read_bytes, read_text
from tir_kernels.text import printable


def test_a_regular_file_is_read(tmp_path):
    path = tmp_path / "words.json"
    path.write_bytes(b"\xef\xbb\xbfgr\xc3\xbcn")
    assert read_text(path, at_most=8) == "grün"
    assert read_bytes(path, at_most=8) == path.read_bytes()


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/"])
def test_devices_and_folders_are_refused(path):
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(path, at_most=10)


def test_a_name_with_a_nul_byte_is_refused():
    with pytest.raises(OSError, match="not the name of a file"):
        open_regular("a\0b")


def test_no_more_is_read_than_was_meant(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"x" * 11)
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bytes(path, at_most=10)


def test_text_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "words.csv"
    path.write_bytes("grün".encode("utf-16"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_text(path, at_most=100)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Wald, 森, é", "Wald, 森, é"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        (os.fsdecode(b"for\xeat"), "for\\xeat"),
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_is_shown_is_printable(text, shown):
    assert printable(text) == shown
    assert str(FewShotError(text)) == shown


def test_the_home_folder_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    assert expand_user("~/images") == Path("/home/of/images")
    assert expand_user(Path("a/~/b")) == Path("a/~/b")
    assert expand_user("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert expand_user("/images") == Path("/images")
    for path in ("~", "~/images", Path("~/images")):
        with pytest.raises(OSError, match="no home folder is known"):
            expand_user(path)
