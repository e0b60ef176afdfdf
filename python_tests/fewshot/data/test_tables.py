"""Tables as data sets come with them."""

import os
import unicodedata

import pytest
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data import documents
from tir_kernels.fewshot.data.dataset import load_data


@pytest.fixture
def table(tmp_path):
    """Write a table beside images a/1.png, b/2.png, c/3.png, and list it."""
    for number, folder in enumerate("abc", start=1):
        (tmp_path / folder).mkdir()
        Image.new("L", (2, number)).save(tmp_path / folder / f"{number}.png")

    def read(text, name="list.csv", encoding="utf-8", **options):
        (tmp_path / name).write_text(text, encoding=encoding)
        return load_data(tmp_path / name, **options)

    return read


def found(data):
    return {entry.folder: entry.files for entry in data.classes}


EXPECTED = {"cat": ("a/1.png", "c/3.png"), "dog": ("b/2.png",)}


@pytest.mark.parametrize(
    ("header", "rows", "columns"),
    [
        (",Filename,Label,ClassName", "0,{0},6,{1};1,{2},3,{3};2,{4},6,{5}", "Filename ClassName"),
        ("image,labels", "{0},{1};{2},{3};{4},{5}", ""),
        ("image_path,category,split", "{0},{1},x;{2},{3},x;{4},{5},x", "image_path category"),
        ("Image Name,Class Name", "{0},{1};{2},{3};{4},{5}", ""),
        ("id,path,label", "7,{0},{1};8,{2},{3};9,{4},{5}", "path label"),
        # The image is not where the likelier name is, nor the words where they usually are.
        ("image,file,label", "x1,{0},{1};x2,{2},{3};x3,{4},{5}", "file label"),
        ("where,label", "{0},{1};{2},{3};{4},{5}", ""),
        ("file,label,animal", "{0},0,{1};{2},1.0,{3};{4},0,{5}", "file animal"),
        # As many names as images: what they are of is not known but from the column's name.
        ("file,label,class_name,owner", "{0},0,{1},A;{2},1,{3},B;{4},0,{5},C", "file class_name"),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns(table, header, rows, columns, delimiter):
    cells = ("a/1.png", "cat", "b/2.png", "dog", "c/3.png", "cat")
    text = "\n".join([header, *rows.format(*cells).split(";")]).replace(",", delimiter)
    data = table(text, "list.tsv" if delimiter == "\t" else "list.csv")
    assert found(data) == EXPECTED
    if columns:
        file, label = columns.split()
        assert (
            f"images are those of column {file}, classes those of column {label}" in (data.notes[0])
        )
    else:
        assert data.notes == ()


def test_numbers_without_names_are_said(table):
    text = "file,label\n1.png,6\n2.png,3\n3.png,6\n"
    data = table(text)
    assert list(found(data)) == ["3", "6"]
    (note,) = data.notes
    assert "names are numbers such as 3, which say nothing in a prompt" in note
    assert "class_names" in note
    assert table(text, class_names={"6": "cat", "3": "dog"}).notes == ()


def test_numbers_and_names_that_disagree(table):
    complaint = "numbers in column 'label' and names in column 'class' that don't correspond"
    with pytest.raises(FewShotError, match=complaint):
        table("file,label,class\n1.png,6,cat\n2.png,3,cat\n3.png,6,cat\n")
    # Another column that doesn't correspond says nothing about classes.
    data = table("file,label,owner\n1.png,6,A\n2.png,3,A\n3.png,6,B\n")
    assert list(found(data)) == ["3", "6"]


@pytest.mark.parametrize("style", ["{:d}", "{:.1f}", "{:.1f};"])
def test_a_column_per_class(table, style):
    names = ["MEL", "AK", "UNK"]
    ones = [(1, 0, 0), (0, 1, 0), (1, 0, 0)]
    delimiter = ";" if style.endswith(";") else ","
    rows = [["image", "age", *names]]
    for number, flags in enumerate(ones, start=1):
        cells = [style.rstrip(";").format(flag) for flag in flags]
        rows.append([f"{number}", f"{40 + number}", *cells])
    text = "\n".join(delimiter.join(row) for row in rows)
    data = table(text.replace(".", ",") if delimiter == ";" else text)
    assert found(data) == {"AK": ("b/2.png",), "MEL": ("a/1.png", "c/3.png")}
    assert "classes those of columns MEL, AK, UNK" in data.notes[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("image,x,y\n1,1,1\n", "line 2 of .* must have 1 in one of the columns x, y"),
        ("image,x,y\n1,0,0\n", "line 2 of .* must have 1 in one of the columns x, y"),
        ("image,x\n1,1\n", "has no column of labels"),
        ("image,x,y\n" + "1,1,0\n" * 12 + "1,?,1\n", "line 14 of .* has '\\?' in column 'x'"),
        ("file,label\n1.png,nan\n", "line 2 of .* has the label 'nan', which stands for none"),
        ("file,label\n1.png,N/A\n", "has the label 'N/A'"),
        ("file,label\n1.png,None\n", "has the label 'None'"),
        ("file,label\n1.png,cat|dog\n", r"all rows of .* have several labels, joined by \|"),
        ("file,label,Label\n1.png,cat,cat\n", "has the columns 'label' and 'Label'"),
        ("f,label\n1.png,cat\n,dog\n", "has no column of files"),
        ("file,label\n1.png," + "x" * 200_000 + "\n", "line 2 of .*: field larger than"),
        ('file,label\n1.png,"cat\n2.png,dog\n', "line 3 of .*: unexpected end of data"),
    ],
)
def test_tables_that_are_refused(table, text, complaint):
    with pytest.raises(FewShotError, match=complaint):
        table(text)


def test_rows_with_several_labels_are_left_out(table):
    data = table("file,label\n1.png,cat\n2.png,cat|dog\n3.png,dog\n")
    assert found(data) == {"cat": ("a/1.png",), "dog": ("c/3.png",)}
    assert "1 of 3 rows with several labels, joined by |" in data.notes[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252"])
def test_tables_in_other_encodings(table, encoding):
    with pytest.raises(FewShotError, match=r"data: .*list\.csv.*save it as UTF-8"):
        table("file,label\n1.png,forêt\n", encoding=encoding)


def test_one_image_by_two_names(table, tmp_path):
    (tmp_path / "link.png").symlink_to("a/1.png")
    for other in ("c/../a/1.png", "./a/1.png", "link.png", str(tmp_path / "a" / "1.png")):
        with pytest.raises(FewShotError, match=r"which are the same file, .* 'cat' and 'dog'"):
            table(f"file,label\na/1.png,cat\n{other},dog\n")


def test_links_in_the_folder_of_images_go_round_once(table, tmp_path):
    (tmp_path / "a" / "loop").symlink_to("..")
    (tmp_path / "b" / "copy.png").symlink_to("2.png")
    data = table("file,label\n1,cat\n2,dog\n")
    assert found(data) == {"cat": ("a/1.png",), "dog": ("b/2.png",)}


def test_pipes_are_no_images(table, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for listed in ("pipe.png", "pipe", "/dev/zero"):
        with pytest.raises(FewShotError, match=f"lists {listed}, but no such file"):
            table(f"file,label\n{listed},cat\n")


def test_names_in_another_form_of_unicode(table, tmp_path):
    parted = unicodedata.normalize("NFD", "é")
    Image.new("L", (3, 3)).save(tmp_path / "a" / f"{parted}.png")
    Image.new("L", (3, 4)).save(tmp_path / "b" / "è.png")
    grave = unicodedata.normalize("NFD", "è")
    data = table(f"file,label\na/é.png,fôret\n{grave},{unicodedata.normalize('NFD', 'fôret')}\n")
    assert found(data) == {"fôret": ("b/è.png", f"a/{parted}.png")[::-1]}
    assert all(data.source.file(name).is_file() for name in data.classes[0].files)


def test_lists_are_read_within_bounds(table, tmp_path, monkeypatch):
    with pytest.raises(FewShotError, match="nested too deeply"):
        table("[" * 100_000, "list.json")
    with pytest.raises(FewShotError, match="not valid JSON: Exceeds the limit"):
        table('{"image_labels": [' + "1" * 5000 + "]}", "list.json")
    with pytest.raises(FewShotError, match="has 'a' twice"):
        table('{"a": 1, "a": 2}', "list.json")
    monkeypatch.setattr("tir_kernels.fewshot.data.tables.LIST_BYTES", 20)
    with pytest.raises(FewShotError, match=r"list\.csv: .*larger than 20 bytes"):
        table("file,label\n1.png,cat\n")
    assert documents.NAMES_BYTES < documents.LIST_BYTES
