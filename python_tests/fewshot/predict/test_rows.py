"""Rows hold any name, are safe to open, and outlive whatever ends the process."""

import csv
import errno
import io
import os

import pytest
import torch

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.predict.rows import (
    Columns,
    KnownNames,
    RowFile,
    as_csv,
    read_rows,
    require_finite,
)

HEADER = ["image", "label", "probability"]


def parsed(text):
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_spreadsheet_runs_a_name(start):
    row = [f"{start}cmd.jpg", f"{start}class", 0.5]
    assert parsed(as_csv([row])) == [[f"'{start}cmd.jpg", f"'{start}class", "0.5"]]
    assert parsed(as_csv([row], is_exact=True)) == [[*row[:2], "0.5"]]


def test_names_of_any_kind_are_one_cell():
    names = ['a "quoted".jpg', "a,b.jpg", "a\nb.jpg", "é\u202f日本.jpg"]
    assert [row[0] for row in parsed(as_csv([[name, 0.1] for name in names]))] == names


def test_columns():
    columns = Columns(("a", "=b", "c"), top=2, probabilities=True)
    assert columns.header == [
        *("image", "label", "probability", "label_2", "probability_2"),
        *("probability:a", "probability:=b", "probability:c"),
    ]
    values = torch.tensor([[0.25, 0.5, 0.25]])
    assert list(columns.rows(["b\udce9.jpg"], values)) == [
        ["b\\xe9.jpg", "=b", 0.5, "a", 0.25, 0.25, 0.5, 0.25]
    ]


def test_exact_rows_read_back_to_the_bit():
    values = torch.rand(100)
    found = parsed(as_csv([[value] for value in values.tolist()], is_exact=True))
    assert torch.equal(torch.tensor([float(row[0]) for row in found]), values)


ROWS = [["a.jpg", "x", 0.5], ['b\n"quoted\n".jpg', "y", 0.25], ["c,.jpg", "x", 1.0]]


def test_a_row_that_is_cut_anywhere_is_written_again(tmp_path):
    path = tmp_path / "p.csv"
    file = RowFile(path, HEADER)
    file.append(ROWS)
    file.close()
    whole = path.read_bytes()
    ends = [len(as_csv([HEADER, *ROWS[:count]]).encode()) for count in range(4)]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = max((n for n, end in enumerate(ends) if end <= cut), default=0)
        assert len(list(read_rows(path))) == (kept + 1 if cut >= ends[0] else 0)
        file = RowFile(path, HEADER)
        file.append(ROWS[kept:])
        file.close()
        assert path.read_bytes() == whole


def test_other_columns_are_not_mixed_with(tmp_path):
    RowFile(tmp_path / "p.csv", HEADER).close()
    with pytest.raises(FewShotError, match="other columns"):
        RowFile(tmp_path / "p.csv", [*HEADER, "label_2"])


def test_a_full_disk_keeps_the_rows_before(tmp_path, monkeypatch):
    file = RowFile(tmp_path / "p.csv", HEADER)
    file.append(ROWS[:1])
    write = os.write
    left = [5]

    def filling(descriptor, content):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, content[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(FewShotError, match="No space left"):
        file.append(ROWS[1:])
    file.close()
    assert [row[0] for row in read_rows(tmp_path / "p.csv")] == ["image", "a.jpg"]
    assert (tmp_path / "p.csv").read_bytes().endswith(b"0.5\n")


def test_names_are_known_as_often_as_they_were_written():
    known = KnownNames(["a", "b", "a"])
    assert len(known) == 3
    assert [known.take(name) for name in "aabbac"] == [True, True, True, False, False, False]
    assert not KnownNames([]).take("a")


def test_numbers_that_overflow_are_refused():
    values = torch.tensor([[0.5, 0.5], [float("nan"), 0.5]])
    with pytest.raises(FewShotError, match=r"b\.jpg overflow"):
        require_finite(["a.jpg", "b.jpg"], values)
