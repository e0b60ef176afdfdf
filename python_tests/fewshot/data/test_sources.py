"""New kinds of data, and new known data sets: one file and one line of a registry each."""

from pathlib import Path

import fake_engine
import pytest

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.image_files import ImageFiles
from tir_kernels.fewshot.data.known import KNOWN_SETS, known_set
from tir_kernels.fewshot.data.known.protocol import KnownSet, KnownTable
from tir_kernels.fewshot.data.protocol import Listing
from tir_kernels.fewshot.data.sources import SOURCES, data_sources
from tir_kernels.fewshot.data.words import class_words
from tir_kernels.text import setting


class Lines:
    """Text files with a class and an image in each line."""

    takes_images = False
    endings = (".lines",)

    def owns(self, data):
        return data.endswith(".lines")

    def read(self, data, images):
        path, files = Path(data), {}
        for line in path.read_text().splitlines():
            label, _, name = line.partition(" ")
            if not name:
                raise FewShotError(f"{setting('data')}: {path} has a line without an image")
            files.setdefault(label, []).append(name)
        return ImageFiles(path.parent), Listing(files, notes=("lines were read",))


FLOWERS = KnownSet(
    words={"r": "red rose", "t": "tulip"},
    table=KnownTable(file="Photo", label="Bloom", kept=("r", "t")),
)


@pytest.fixture
def lines(make_images, monkeypatch):
    monkeypatch.setitem(SOURCES, "lines", f"{__name__}:Lines")
    root = make_images({"a": 3, "b": 4})
    path = root / "all.lines"
    names = [each.relative_to(root) for each in sorted(root.rglob("*.png"))]
    path.write_text("".join(f"{name.parent} {name}\n" for name in names))
    return path


def test_a_new_kind_of_data(lines, tmp_path, capsys):
    data = load_data(lines)
    assert [(each.folder, len(each.files)) for each in data.classes] == [("a", 3), ("b", 4)]
    assert data.notes == ("lines were read",)
    assert data.fingerprint == load_data(lines.parent).fingerprint
    arguments = ["run", "--data", str(lines), "--model=fake", "--out", str(tmp_path / "out")]
    arguments += ["--method=zero-shot", "--ways=2", "--shots=1", "--queries=2", "--episodes=1"]
    assert fake_engine.run_main([*arguments, "--device=cpu"]) == 0
    lines.write_text("nothing\n")
    assert fake_engine.run_main([*arguments, "--device=cpu"]) == 2
    assert "error: --data: " in capsys.readouterr().err


def test_a_new_kind_of_data_says_what_it_takes(lines, tmp_path):
    with pytest.raises(FewShotError, match=r"images goes with .*data=.*all\.lines is none"):
        load_data(lines, images=tmp_path)
    lines.with_name("other.txt").touch()
    with pytest.raises(FewShotError, match=r"does not end in \.json, \.csv, \.tsv or \.lines;"):
        load_data(lines.with_name("other.txt"))


def test_kinds_own_nothing_that_is_not_there():
    for name in ("/no/such/place", "/no/list.json", "nul\0byte", "x" * 5000, "/dev/zero"):
        assert not any(each.owns(name) for each in data_sources())


def test_a_new_known_data_set(monkeypatch, make_images):
    monkeypatch.setitem(KNOWN_SETS, "flowers", f"{__name__}:FLOWERS")
    assert known_set("flowers") is FLOWERS
    assert class_words(["R", "t"])[0] == {"R": "red rose", "t": "tulip"}
    assert class_words(["t"], "flowers") == ({"t": "tulip"}, "")
    root = make_images({"r": 2, "t": 2, "weed": 2})
    rows = [f"{p.relative_to(root)},{p.parent.name},1" for p in sorted(root.rglob("*.png"))]
    table = root / "table.csv"
    table.write_text("\n".join(["Photo,Bloom,Count", *rows]))
    data = load_data(table)
    assert [(each.words, len(each.files)) for each in data.classes] == [
        ("red rose", 2),
        ("tulip", 2),
    ]
    assert "4 of 6 images kept, those with a single label that is one of r, t" in data.notes[1]
