"""Images are found wherever a user may have them, in one order, and none is lost silently."""

import inspect
import io
import os
import sys

import pytest
from fewshot.predict.found import names, problems, shard

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.predict import folders
from tir_kernels.fewshot.predict.sources import Sources


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"content of " + os.fsencode(name))
    return root


@pytest.mark.parametrize("at_once", [2, 3, 2**16])
def test_folders_are_walked_by_name_however_much_is_held(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(folders, "_AT_ONCE", at_once)
    expected = ["a.jpg", "b/1.png", "b/2.PNG", "b/c/x.tif", "c.jpg", "d.jpeg", "z/a.webp"]
    write(tmp_path, *expected)
    assert names(tmp_path, root=tmp_path) == expected


def test_what_programs_leave_is_left_out_and_counted(tmp_path):
    write(tmp_path, "a.jpg", "._a.jpg", ".hidden/b.jpg", "Thumbs.db", "@eaDir/a.jpg", "notes.txt")
    sources = Sources([str(tmp_path)])
    assert [image.name for image in sources.share(0, 1)] == [str(tmp_path / "a.jpg")]
    assert str(sources.left_out) == (
        "1 file ending in .txt, 1 image hidden or left by another program"
    )


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path, "in/a.jpg", "other/b.jpg")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "self").symlink_to("self")
    assert names(tmp_path / "in", root=tmp_path / "in") == ["a.jpg", "more/b.jpg"]


def test_deeper_than_pythons_stack(tmp_path):
    write(tmp_path, "d/" * 150 + "x.jpg")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = names(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert len(found) == 1


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    write(tmp_path, "a/x.jpg", "b/y.jpg", "c/z.jpg")
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert names(tmp_path, root=tmp_path) == ["a/x.jpg", "b", "c/z.jpg"]
    assert "Permission denied" in problems(tmp_path)[str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("*", ["a.jpg", "d/b.jpg", "d/e/c.jpg", "d/e/c.png", "f/b.jpg"]),
        ("**/*.jpg", ["a.jpg", "d/b.jpg", "d/e/c.jpg", "f/b.jpg"]),
        ("?/b.jpg", ["d/b.jpg", "f/b.jpg"]),
        ("[df]/b.*", ["d/b.jpg", "f/b.jpg"]),
        ("d/**", ["d/b.jpg", "d/e/c.jpg", "d/e/c.png"]),
        ("**/e/*", ["d/e/c.jpg", "d/e/c.png"]),
        (".h/*", [".h/x.jpg"]),
    ],
)
def test_patterns(tmp_path, pattern, expected):
    write(tmp_path, "a.jpg", "d/b.jpg", "d/e/c.jpg", "d/e/c.png", "f/b.jpg", ".h/x.jpg", "n.txt")
    assert names(tmp_path / pattern, root=tmp_path) == expected


def test_a_file_that_is_called_like_a_pattern(tmp_path):
    write(tmp_path, "a[1].jpg", "a1.jpg", "{1..2}.jpg")
    assert names(tmp_path / "a[1].jpg", root=tmp_path) == ["a[1].jpg"]
    assert names(tmp_path / "{1..2}.jpg", root=tmp_path) == ["{1..2}.jpg"]


def test_ranges_of_shards(tmp_path):
    for number in (8, 9, 10):
        shard(tmp_path / f"s-{number:03d}.tar", f"{number}.jpg")
    assert names(tmp_path / "s-{008..010}.tar", root=tmp_path) == [
        "s-008.tar/8.jpg",
        "s-009.tar/9.jpg",
        "s-010.tar/10.jpg",
    ]
    with pytest.raises(FewShotError, match=r"no file or folder .*s-011\.tar"):
        names(tmp_path / "s-{008..011}.tar")
    with pytest.raises(FewShotError, match="stands for"):
        names(tmp_path / "{0..999999999}.tar")


def test_nothing_there_is_an_error_at_once(tmp_path):
    with pytest.raises(FewShotError, match=r"no file or folder .*typo"):
        Sources([str(tmp_path / "typo")])
    with pytest.raises(FewShotError, match="no image matches"):
        Sources([str(tmp_path / "*.jpg")])


def test_lists_of_lines(tmp_path, monkeypatch):
    write(tmp_path, "lists/beside.jpg", "here.jpg", "lists/both.jpg", "both.jpg")
    monkeypatch.chdir(tmp_path)
    content = f"\ufeffbeside.jpg\r\n\nhere.jpg\nboth.jpg\ngone.jpg\n{tmp_path}/here.jpg"
    (tmp_path / "lists" / "l.txt").write_bytes(content.encode() + b"\nb\xe9.jpg\n")
    found = list(Sources(["lists/l.txt"]).share(0, 1))
    assert [image.name for image in found] == [
        "beside.jpg",
        "here.jpg",
        "both.jpg",
        "gone.jpg",
        f"{tmp_path}/here.jpg",
        "b\udce9.jpg",
    ]
    files = ["lists/beside.jpg", "here.jpg", "lists/both.jpg"]
    assert [str(image.file) for image in found[:3]] == files


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("l.csv", 'label,Path\ncat,a.jpg\n"x, y","b,c.jpg"\n', ["a.jpg", "b,c.jpg"]),
        ("l.csv", "file_name;label\na.jpg;cat\n", ["a.jpg"]),
        ("l.tsv", "label\timage\tpath\ncat\ta.jpg\tb.jpg\n", ["a.jpg"]),
        ("l.csv", "a.jpg\nb.jpg\n", ["a.jpg", "b.jpg"]),
        ("l.csv", "image\na.jpg\n", ["a.jpg"]),
        ("l.csv", "label,image\ncat\n,\ndog,b.jpg\n", ["line 2 of L", "b.jpg"]),
        ("l.csv", "", []),
    ],
)
def test_lists_in_tables(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    expected = [each.replace(" L", f" {tmp_path / name}") for each in expected]
    assert names(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.csv", b"a,b\n1,2\n", "no column of paths"),
        ("l.csv", b'image,b\n"never closed\n' * 2, "line"),
        ("l.txt", "a.jpg\n".encode("utf-16"), "UTF-8"),
        ("l.txt", b"x" * 2**17, "longer than a path"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FewShotError, match=words):
        names(tmp_path / name)


def test_paths_on_standard_input(tmp_path, monkeypatch):
    write(tmp_path, "a.jpg")
    text = io.TextIOWrapper(io.BytesIO(f"{tmp_path}/a.jpg\nb.jpg\n".encode()))
    monkeypatch.setattr(sys, "stdin", text)
    assert names("-") == [f"{tmp_path}/a.jpg", "b.jpg"]


def test_processes_share_all_images_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names decide about shares, and no test's folder may
    write(tmp_path, *(f"i/{number}.jpg" for number in range(300)))
    for number in range(3):
        shard(tmp_path / f"{number}.tar", f"{number}a.jpg", f"{number}b.jpg")
    arguments = ["i", "*.tar"]
    shares = [[each.name for each in Sources(arguments).share(rank, 2)] for rank in range(2)]
    assert sorted(name for share in shares for name in share) == sorted(names(*arguments))
    in_shards = [[name for name in share if ".tar/" in name] for share in shares]
    assert [len(share) for share in in_shards] == [4, 2]
    assert all(120 < len(share) < 180 for share in shares)


def test_all_namings_of_an_image_or_a_shard_are_for_one_process(tmp_path):
    write(tmp_path, *(f"i/{number}.jpg" for number in range(20)))
    for number in range(4):
        shard(tmp_path / f"{number}.tar", f"{number}a.jpg")
    arguments = [str(tmp_path / each) for each in ("i", "*.tar", "i/[0-4].jpg", "{1..3}.tar")]
    (tmp_path / "l.txt").write_text("\n".join(names(tmp_path / "i")))
    arguments.append(str(tmp_path / "l.txt"))
    for count in (1, 2, 3, 7):
        shares = [[each.name for each in Sources(arguments).share(rank, count)]
                  for rank in range(count)]  # fmt: skip
        assert sorted(name for share in shares for name in share) == sorted(names(*arguments))
        assert sum(map(len, map(set, shares))) == 24, "no name in two shares"
