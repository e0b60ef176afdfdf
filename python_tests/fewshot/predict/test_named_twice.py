"""Each naming of an image gives a row: after any stop, in any number of processes."""

import csv
import random
from collections import Counter

import pytest
from fewshot.predict.found import names, shard

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.predict.output import Files
from tir_kernels.fewshot.predict.rows import Columns
from tir_kernels.fewshot.predict.sources import Sources
from tir_kernels.fewshot.run.workers import Place

COLUMNS = Columns(("a", "b"))


class Killed(Exception):
    pass


@pytest.fixture
def overlapping(tmp_path):
    """Arguments that name images one to four times, in folders, lists and shards."""
    folder = tmp_path / "images"
    (folder / "in").mkdir(parents=True)
    for number in range(12):
        (folder / ("in" if number % 2 else ".") / f"{number:02d}.jpg").touch()
    listed = [f"{folder}/00.jpg"] * 2 + [f"{folder}/in/01.jpg"]
    (tmp_path / "l.txt").write_text("\n".join(listed))
    inside = [shard(tmp_path / f"{number}.tar", "a.jpg", "b.jpg", "a.jpg") for number in range(2)]
    arguments = [folder, folder / "in", tmp_path / "l.txt", *inside, inside[1], folder / "in"]
    return [str(each) for each in arguments]


def work(arguments, out, place, at_most):
    """A process that is killed when it has written so many rows."""
    with Files(out, COLUMNS, place).open({}) as files:
        for image in Sources(arguments).share(place.rank, place.count):
            if files.is_known(image.name):
                continue
            if not at_most:
                raise Killed
            files.write([[image.name, "a", 0.5]])
            at_most -= 1


def rows(out):
    return Counter(row[0] for row in Files(out, COLUMNS, Place("a reader")).read())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_after_stops_and_in_several_processes(overlapping, tmp_path, seed, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow.parquet")
    expected = Counter(names(*overlapping))
    assert set(expected.values()) == {1, 2, 3, 4}
    draw = random.Random(seed)
    out = tmp_path / f"p.{ending}"
    for turn in range(8):
        count = draw.randint(1, 4)
        for rank in range(count):  # the later ones find rows that the earlier have just written
            try:
                work(overlapping, out, Place(f"{turn}", rank, count), draw.randint(0, 3))
            except Killed:
                assert rows(out) <= expected
    count = draw.randint(1, 4)
    for rank in range(count):
        work(overlapping, out, Place("to the end", rank, count), 1000)
    assert rows(out) == expected


@pytest.mark.slow
def test_by_the_command(classifier, images, tmp_path):
    twice = [images, sorted(images.iterdir())[0]]
    arguments = ["predict", str(classifier), *map(str, twice), "--device=cpu", "--out"]
    out = tmp_path / "p.csv"
    assert main([*arguments, str(out)]) == 0
    whole = out.read_text()
    with open(out, newline="") as file:
        found = Counter(row["image"] for row in csv.DictReader(file))
    assert found == Counter(names(*twice))
    assert sorted(found.values()) == [1] * 10 + [2] * 5
    lines = whole.splitlines(keepends=True)
    for kept in (3, 12, 17):
        out.write_text("".join(lines[:kept]))
        assert main([*arguments, str(out)]) == 0
        again = out.read_text().splitlines(keepends=True)
        assert [line.rsplit(",", 1)[0] for line in again] == [
            line.rsplit(",", 1)[0] for line in lines
        ]
