"""Images that a JSON or CSV file lists, wherever they lie."""

import json
from pathlib import Path

import fake_engine
import pytest
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def add(folder, *names):
    """Put small images of different sizes into a folder."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2 + number)).save(path)


def write_json(path, images, classes=("cat", "Big_Dog"), **changes):
    content = {
        "image_names": [str(name) for name, _ in images],
        "image_labels": [label for _, label in images],
        "label_names": list(classes),
    }
    path.write_text(json.dumps(content | changes))
    return path


def found(data):
    return {entry.folder: entry.files for entry in data.classes}


def test_json_list_with_relative_paths(folder):
    add(folder, "a/1.png", "a/2.png", "b/1.png")
    images = [("b/1.png", 1), ("a/2.png", 0), ("a/1.png", 0)]
    path = write_json(folder / "list.json", images, classes=("cat", "Big_Dog", "nobody"))
    data = load_data(path)
    assert found(data) == {"Big_Dog": ("b/1.png",), "cat": ("a/1.png", "a/2.png")}
    assert [entry.words for entry in data.classes] == ["big dog", "cat"]
    assert data.source.file("b/1.png") == folder / "b" / "1.png"
    names = {"cat": "tiger", "Big_Dog": "wolf"}
    renamed = load_data(path, class_names=names)
    assert [entry.words for entry in renamed.classes] == ["wolf", "tiger"]
    assert renamed.fingerprint != data.fingerprint


def test_json_list_with_absolute_paths_of_this_machine(folder):
    add(folder, "elsewhere/1.png", "elsewhere/2.png")
    (folder / "lists").mkdir()
    images = [(folder / "elsewhere" / f"{n}.png", n - 1) for n in (1, 2)]
    data = load_data(write_json(folder / "lists" / "x.json", images))
    assert found(data)["cat"] == (str(folder / "elsewhere" / "1.png"),)
    assert data.classes[0].stamps[0][0] == (folder / "elsewhere" / "2.png").stat().st_size


def test_paths_of_another_machine_are_matched_by_their_end(folder):
    add(folder, "images/train/cats/1.png", "images/val/cats/1.png", "images/train/dogs/1.png")
    images = [("/home/x/data/train/cats/1.png", 0), ("/home/x/data/train/dogs/1.png", 1)]
    path = write_json(folder / "list.json", images)
    expected = {"cat": ("train/cats/1.png",), "Big_Dog": ("train/dogs/1.png",)}
    assert found(load_data(path, images=folder / "images")) == expected
    assert found(load_data(path))["cat"] == ("images/train/cats/1.png",)
    # Where the other machine's paths exist by chance, the folder that was named counts.
    own = write_json(folder / "own.json", [(folder / "images/val/cats/1.png", 0)])
    add(folder, "copy/val/cats/1.png")
    assert found(load_data(own, images=folder / "copy")) == {"cat": ("val/cats/1.png",)}


def test_ambiguous_missing_and_mistaken_images(folder):
    add(folder, "train/cats/1.png", "val/cats/1.png", "train/dogs/7.png", "flat.png")

    def refused(listed, complaint, **options):
        with pytest.raises(FewShotError, match=complaint):
            load_data(write_json(folder / "list.json", listed), **options)

    refused(
        [("/x/cats/1.png", 0)],
        r"lists /x/cats/1\.png, which may be train/cats/1\.png or val/cats/1\.png in "
        r".*with images$",
    )
    refused([("/x/cats/9.png", 0)], r"lists /x/cats/9\.png, but no such file is in .*with images$")
    # 7.png is there, but beside images of another class.
    refused([("/x/cats/7.png", 0), ("/x/dogs/7.png", 1)], r"lists /x/cats/7\.png, but no such")
    refused(
        [("/x/flat.png", 0), ("/y/flat.png", 1)],
        r"lists /x/flat\.png and /y/flat\.png, which are the same file",
    )
    refused([("flat.png", 0)], "^images: there is no folder .*none", images=folder / "none")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image_names": "a"}, "image_names is not a list of strings"),
        ({"image_labels": [0.5]}, "image_labels is not a list of whole numbers"),
        ({"image_labels": [True]}, "image_labels is not a list of whole numbers"),
        ({"label_names": None}, "label_names is not a list of strings"),
        ({"image_labels": [0, 1]}, "has 1 image_names but 2 image_labels"),
        ({"image_labels": [2]}, "gives 1.png the label 2, but its 2 label_names are counted"),
        ({"image_labels": [-1]}, "gives 1.png the label -1"),
        ({"label_names": ["cat", "cat"]}, "has 'cat' twice"),
        ({"image_names": [], "image_labels": []}, "lists no images"),
    ],
)
def test_bad_json_lists(folder, changes, complaint):
    add(folder, "1.png")
    with pytest.raises(FewShotError, match=complaint):
        load_data(write_json(folder / "list.json", [("1.png", 0)], **changes))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[]", "must hold an object with image_names"),
        ("a.json", b"\xff", "can't read .*a.json"),
        ("a.txt", b"", r"does not end in \.json, \.csv or \.tsv"),
        ("a.csv", b"", "has no column of files: .* it names nothing"),
        ("a.csv", b"file,what\n", "has no column of labels: .*class.* it names file, what"),
        ("a.csv", b"file,label\n1.png\n", "line 2 of .* has 1 columns, its header 2"),
        ("a.csv", b"file,label\n\n1.png,\n", "line 3 of .* lacks a file or a label"),
        ("a.csv", b"file,label\n", "lists no images"),
        ("a.csv", b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n1,1,1,0,0,0,0,0\n", "line 2 .* must have"),
        ("a.csv", b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n1,x,1,0,0,0,0,0\n", "line 2 .* must have"),
    ],
)
def test_bad_lists(folder, name, content, complaint):
    add(folder, "1.png")
    (folder / name).write_bytes(content)
    with pytest.raises(FewShotError, match=complaint):
        load_data(folder / name)


def test_images_go_with_a_list_only(folder):
    add(folder, "a/1.png")
    with pytest.raises(FewShotError, match=r"^images goes with a JSON or CSV file"):
        load_data(folder, images=folder)


@pytest.mark.parametrize(
    "header", ["file,label", "Filename,class", "image_id,dx", "\ufeffimage,Category", "path,label"]
)
def test_csv_of_file_and_label(folder, header):
    add(folder, "x/1.png", "x/2.png", "deep/er/3.jpg")
    text = f'{header}\nx/1.png,cat\n\n"x/2.png","cat, big"\n3,cat\n'
    (folder / "list.CSV").write_text(text, encoding="utf-8")
    data = load_data(folder / "list.CSV")
    assert found(data) == {"cat": ("deep/er/3.jpg", "x/1.png"), "cat, big": ("x/2.png",)}


def test_csv_may_have_more_columns(folder):
    add(folder, "i/1.png", "i/2.png")
    (folder / "list.csv").write_text("id,label,age,image\n7,a,3,1.png\n8,b,4,2.png\n")
    assert found(load_data(folder / "list.csv")) == {"a": ("i/1.png",), "b": ("i/2.png",)}


def test_isic_ground_truth(folder):
    add(folder, *(f"in/ISIC_{n}.jpg" for n in range(3)))
    text = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
    text += "ISIC_0,0.0,1.0,0.0,0.0,0.0,0.0,0.0\nISIC_1,1,0,0,0,0,0,0\nISIC_2,0,1,0,0,0,0,0\n"
    (folder / "truth.csv").write_text(text)
    data = load_data(folder / "truth.csv", images=folder / "in")
    assert found(data) == {"MEL": ("ISIC_1.jpg",), "NV": ("ISIC_0.jpg", "ISIC_2.jpg")}
    assert [entry.words for entry in data.classes] == ["melanoma", "melanocytic nevus"]
    columns, words, published = data.notes
    assert columns.endswith("of columns MEL, NV, BCC, AKIEC, BKL, DF, VASC")
    assert "isic2018" in words
    assert "has 3 images, ISIC 2018 task 3 as published 10,015; without its classes" in published


@pytest.mark.parametrize("end", ["", ","])
def test_chestx_table(folder, end):
    add(folder, "images_001/images/1_0.png", "images_002/images/2_0.png", "images_002/images/3.png")
    text = f"Image Index,Finding Labels,Follow-up #,OriginalImage[Width,Height]{end}\n"
    rows = ["1_0.png,Mass", "2_0.png,Nodule", "9.png,Mass|Nodule", "8.png,No Finding", "3.png,Mass"]
    (folder / "Data_Entry_2017.csv").write_text(text + "".join(f"{r},0,1,2,\n" for r in rows))
    data = load_data(folder / "Data_Entry_2017.csv")
    assert found(data) == {
        "Mass": ("images_001/images/1_0.png", "images_002/images/3.png"),
        "Nodule": ("images_002/images/2_0.png",),
    }
    columns, kept, words, published = data.notes
    assert "of column Image Index, classes those of column Finding Labels" in columns
    assert "3 of 5 images kept" in kept
    assert "Pneumothorax" in kept
    assert "chestx" in words
    assert "has 3 images, ChestX of the cross-domain few-shot benchmark as published" in published


def test_real_images_listed(real_data, tmp_path):
    # The paths are those of another machine, with another folder above the classes.
    names = sorted(path for path in (real_data / "eurosat").rglob("*.jpg"))
    classes = sorted({path.parent.name for path in names})
    images = [(f"/far/2750/{p.parent.name}/{p.name}", classes.index(p.parent.name)) for p in names]
    path = write_json(tmp_path / "list.json", images, classes)
    listed = load_data(path, images=real_data / "eurosat")
    assert listed.fingerprint == load_data(real_data / "eurosat").fingerprint


def test_a_list_on_the_command_line(folder, capsys):
    names = [f"deep/{kind}_{n}.png" for kind in ("Forest", "River") for n in range(3)]
    add(folder, *names)
    (folder / "lists").mkdir()
    rows = [f"/x/{name},{Path(name).name.split('_')[0]}\n" for name in names]
    (folder / "lists" / "l.csv").write_text("file,label\n" + "".join(rows))
    arguments = ["run", "--data", str(folder / "lists" / "l.csv"), "--model", "fake"]
    arguments += ["--out", str(folder / "out"), "--method", "zero-shot", "--device=cpu"]
    arguments += ["--ways=2", "--shots=1", "--queries=2", "--episodes=1"]
    assert fake_engine.run_main(arguments) == 2
    assert "pass the images' folder with --images" in capsys.readouterr().err
    assert fake_engine.run_main([*arguments, "--images", str(folder / "deep")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "class names are those of eurosat: Forest is 'forest', River is 'river'"
    settings = json.loads((folder / "out" / "settings.json").read_text())
    assert settings["about"]["data"] == str(folder / "deep")
