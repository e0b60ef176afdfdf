"""Shards are read by WebDataset's library, which loses nothing silently and runs nothing."""

import gc
import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile

import pytest
from command_line import assert_refused
from fewshot.predict.found import names, problems, shard

from tir_kernels.fewshot.predict import shards
from tir_kernels.fewshot.predict.sources import Sources


def images(path):
    return list(Sources([str(path)]).share(0, 1))


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_the_images_in_their_order_and_nothing_else(tmp_path, mode):
    members = ["./1.jpg", "1.txt", "1.cls", "d/2.png", "._2.png", "__meta__/a.jpg", "3.JPG"]
    members += ["__MACOSX/3.jpg", "__x__", "a.b/c.d.webp"]
    path = shard(tmp_path / f"s.tar{mode[1:].replace(':', '.')}", *members, mode=mode)
    found = images(path)
    wanted = ["./1.jpg", "d/2.png", "__meta__/a.jpg", "3.JPG", "a.b/c.d.webp"]
    assert [image.name for image in found] == [f"{path}/{name}" for name in wanted]
    assert [image.file for image in found] == [f"content of {name}".encode() for name in wanted]


@pytest.mark.parametrize("ending", [".tar", ".tgz"])
def test_a_shard_of_the_librarys_own_writer(tmp_path, ending):
    from webdataset import TarWriter

    path = tmp_path / f"s{ending}"
    with TarWriter(str(path), encoder=False) as writer:
        for number in range(3):
            sample = {"jpg": b"image %d" % number, "seg.png": b"mask", "cls": b"1", "json": b"{}"}
            writer.write({"__key__": f"d/{number:03d}", **sample})
    found = {image.name.removeprefix(f"{path}/"): image.file for image in images(path)}
    assert found == {
        f"d/{number:03d}.{kind}": content
        for number in range(3)
        for kind, content in (("jpg", b"image %d" % number), ("seg.png", b"mask"))
    }


def test_nothing_is_decoded_and_no_name_is_a_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    folder = tmp_path / "pipe:mkdir run;"
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name in ("0.pyd", "0.pth", "0.pickle", "0.jpg"):
            add(tar, name, pickle.dumps(Harmful()))
    found = images("pipe:mkdir run;/s.tar")
    assert [image.file for image in found] == [pickle.dumps(Harmful())]
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_what_the_library_passes_over_is_told_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_BYTES", 100)
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "first.jpg", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(tar, "a.jpg", b"a")
        add(tar, "label.txt", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="a.jpg")
        add(tar, "folder.jpg", type=tarfile.DIRTYPE)
        add(tar, "large.jpg", b"x" * 101)
        add(tar, "large.txt", b"x" * 2 * shards._SMALL_BYTES)
        add(tar, "b.jpg", b"b")
        add(tar, "device.jpg", type=tarfile.CHRTYPE)
    found = [
        (image.name.removeprefix(f"{path}/"), image.file if isinstance(image.file, bytes) else "")
        for image in images(path)
    ]
    wanted = [("first.jpg", ""), ("a.jpg", b"a"), ("hard.jpg", ""), ("large.jpg", "")]
    assert found == [*wanted, ("b.jpg", b"b"), ("device.jpg", "")]
    reasons = {name.removeprefix(f"{path}/"): reason for name, reason in problems(path).items()}
    assert "101 bytes" in reasons.pop("large.jpg")
    assert set(reasons.values()) == {"it is a link or a device in the shard"}


def test_a_file_that_claims_to_be_large_is_not_read(tmp_path):
    """A sparse member of a terabyte has a few bytes in the shard."""
    with open(tmp_path / "0.jpg", "wb") as file:
        file.truncate(2**40)
    subprocess.run(["tar", "cSf", "s.tar", "0.jpg"], cwd=tmp_path, check=True)
    (reason,) = problems(tmp_path / "s.tar").values()
    assert f"{2**40} bytes" in reason


def test_a_damaged_shard_gives_what_it_has_and_is_told(tmp_path):
    path = shard(tmp_path / "s.tar", *(f"{number}.jpg" for number in range(5)))
    content = bytearray(path.read_bytes())
    for cut, words in (
        (1024 * 3, "may be cut off"),  # between members
        (1024 * 3 + 100, "no member begins at byte 3072"),  # in a header
        (1024 * 3 + 515, "unexpected end of data"),  # in a member
    ):
        path.write_bytes(content[:cut])
        found = names(path)
        assert found[:3] == [f"{path}/{number}.jpg" for number in range(3)]
        assert found[-1] == str(path)
        reason = problems(path)[str(path)]
        assert reason.startswith("the shard is damaged: ")
        assert words in reason
        assert " @ " not in reason
    content[1024 * 2 : 1024 * 2 + 512] = b"\x55" * 512
    path.write_bytes(content)
    assert names(path) == [f"{path}/0.jpg", f"{path}/1.jpg", str(path)]
    path.write_bytes(b"no tar")
    assert "damaged" in problems(path)[str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_damaged_compressed_shard_is_told(tmp_path, mode):
    path = tmp_path / f"s.tar.{mode[2:]}"
    with tarfile.open(path, mode) as tar:
        for number in range(50):
            add(tar, f"{number}.jpg", os.urandom(20_000))
    content = path.read_bytes()
    assert not problems(path)
    path.write_bytes(content[: len(content) // 2])
    found = names(path)
    # In bzip2 and xz, a block is read as a whole.
    assert found[:-1] == [f"{path}/{number}.jpg" for number in range(len(found) - 1)]
    assert list(problems(path)) == [found[-1]] == [str(path)]
    changed = bytearray(content)
    changed[-6] ^= 255  # the check of the content at its end
    path.write_bytes(changed)
    assert str(path) in problems(path)


def test_shards_that_were_joined(tmp_path):
    one = shard(tmp_path / "1.tar", "1.jpg").read_bytes()
    two = shard(tmp_path / "2.tar", "2.jpg").read_bytes()
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one + two)
    assert names(joined) == [f"{joined}/1.jpg", str(joined)]
    assert "goes on behind its end" in problems(joined)[str(joined)]
    # One that was compressed in parts is whole.
    parts = tmp_path / "parts.tgz"
    parts.write_bytes(gzip.compress(one[:700]) + gzip.compress(one[700:]))
    assert names(parts) == [f"{parts}/1.jpg"]
    assert not problems(parts)


def test_whatever_the_library_passes_over_is_told(tmp_path, monkeypatch):
    """Also what it passes over in other versions, or since the file is another by now."""
    path = shard(tmp_path / "s.tar", "1.jpg", "1.txt", "2.jpg", "3.jpg", "4.jpg")

    def passing_over(file, skip_meta, select_files):
        for name in ("1.jpg", "3.jpg"):
            assert select_files(name)
            yield {"fname": name, "data": name.encode()}

    monkeypatch.setattr(shards, "require_reader", lambda: passing_over)
    assert names(path) == [f"{path}/{number}.jpg" for number in (1, 2, 3, 4)]
    assert [name[-5:] for name in problems(path)] == ["2.jpg", "4.jpg"]

    def changed(file, skip_meta, select_files):
        yield {"fname": "1.jpg", "data": b""} if select_files("1.jpg") else {}
        select_files("other.jpg")

    monkeypatch.setattr(shards, "require_reader", lambda: changed)
    assert "changed while it was read" in problems(path)[str(path)]


def test_without_the_library_shards_are_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    path = shard(tmp_path / "s.tar", "1.jpg")
    advice = 'pip install "tir_kernels[webdataset]"'
    for argument in (path, tmp_path / "*.tar"):
        assert_refused(capsys, ["predict", "no classifier", str(argument)], advice)


@pytest.mark.slow
def test_the_library_is_loaded_for_shards_alone(tmp_path):
    code = (
        "import sys; from tir_kernels.fewshot.command import main\n"
        "from tir_kernels.fewshot.predict.sources import Sources\n"
        "Sources(['.']); assert 'webdataset' not in sys.modules\n"
        "main(['predict', '--help']); assert 'webdataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jpg", "cls"])
def test_headers_of_members_are_not_held(tmp_path, ending):
    """Not even of those that give no image."""

    def count():
        return sum(isinstance(each, tarfile.TarInfo) for each in gc.get_objects())

    path = shard(tmp_path / "s.tar", *(f"{number}.{ending}" for number in range(200)), "last.jpg")
    gc.collect()
    before = count()
    found = Sources([str(path)]).share(0, 1)
    assert max(count() for _ in found) - before < 20
