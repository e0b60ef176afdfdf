"""Data sets of Hugging Face, as folders that save_to_disk wrote."""

import io
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from fake_engine import small_preprocess
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.cache import ImageCache
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.reader import ImageReader


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip(
        "datasets", reason='needs the package datasets: pip install -e ".[huggingface]"'
    )


def noise(seed):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))


LABELS = [0, 1, 1, 0, 1]


@pytest.fixture
def make(datasets, tmp_path):
    """Save a data set of five images, with other columns if given."""

    def save(name="saved", encoded=None, labels=LABELS, **columns):
        if encoded is None:
            encoded = []
            for number in range(5):
                buffer = io.BytesIO()
                noise(number).save(buffer, "PNG")
                encoded.append({"bytes": buffer.getvalue(), "path": None})
        values = {"picture": encoded, "kind": labels}
        features = {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["SeaLake", "AnnualCrop", "River"]),
        }
        for column, (feature, content) in columns.items():
            values[column], features[column] = content, feature
        made = datasets.Dataset.from_dict(values, features=datasets.Features(features))
        made.save_to_disk(tmp_path / name)
        return tmp_path / name

    return save


def test_saved_data_set(make):
    data = load_data(make())
    assert [entry.folder for entry in data.classes] == ["AnnualCrop", "SeaLake"]
    assert [entry.words for entry in data.classes] == ["annual crop land", "sea or lake"]
    assert data.classes[0].files == ("1", "2", "4")
    assert data.classes[1].files == ("0", "3")
    reader = ImageReader(data, small_preprocess)
    for position, row in enumerate((1, 2, 4)):
        expected = small_preprocess.to_pixels(noise(row))
        assert torch.equal(reader.read(data.classes[0], position), expected)
    buffer = io.BytesIO()
    noise(2).save(buffer, "PNG")
    assert data.classes[0].stamps[1][0] == len(buffer.getvalue())


def test_images_that_are_files(datasets, monkeypatch, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for number, path in enumerate(paths):
        noise(number).save(path)
    made = datasets.Dataset.from_dict(
        {"image": paths, "label": [0, 1, 0, 1]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        ),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split=None: made)
    data = load_data("hf:some/one")
    assert data.source.file("3") == tmp_path / "3.png"
    pixels = ImageReader(data, small_preprocess).read(data.classes[1], 1)
    assert torch.equal(pixels, small_preprocess.to_pixels(noise(3)))
    os.utime(tmp_path / "3.png", ns=(0, 5))  # as one written over it
    assert load_data("hf:some/one").fingerprint != data.fingerprint
    (tmp_path / "0.png").unlink()
    (tmp_path / "0.png").symlink_to("2.png")
    with pytest.raises(FewShotError, match=r"rows 0 and 2 are the same file, .*2\.png"):
        load_data("hf:some/one")
    (tmp_path / "0.png").unlink()
    with pytest.raises(FewShotError, match=r"data: hf:some/one .*No such file.*0\.png"):
        load_data("hf:some/one")
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(FewShotError, match=r"0\.png of row 0 is not a regular file"):
        load_data("hf:some/one")


def test_rows_without_image_or_label(make):
    with pytest.raises(FewShotError, match=r"row 2 of .* has no label"):
        load_data(make("label", labels=[0, 1, None, 0, 1]))
    with pytest.raises(FewShotError, match="row 0 has no image"):
        load_data(make("image", encoded=[None] * 5))


def test_fingerprint_and_cache_follow_the_content(make, tmp_path):
    notices = []

    def read(data):
        cache = ImageCache(tmp_path / "cache", small_preprocess.shape, notify=notices.append)
        reader = ImageReader(data, small_preprocess, cache=cache)
        return torch.stack([reader.read(data.classes[0], position) for position in range(3)])

    one, again = load_data(make("one")), load_data(tmp_path / "one")
    copy = load_data(shutil.copytree(tmp_path / "one", tmp_path / "copy"))
    assert one.fingerprint == again.fingerprint == copy.fingerprint
    assert torch.equal(read(one), read(again))
    assert len(list((tmp_path / "cache").glob("*/*"))) == 3
    # Bitmaps are all of one size.
    encoded = []
    for number in range(10):
        buffer = io.BytesIO()
        noise(number).save(buffer, "BMP")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    for name, content in (("two", encoded[:5]), ("two2", encoded[5:])):
        data = load_data(make(name, encoded=content))
        plain = ImageReader(data, small_preprocess)
        for position, pixels in enumerate(read(data)):
            assert torch.equal(pixels, plain.read(data.classes[0], position))
    assert data.fingerprint != load_data(tmp_path / "two").fingerprint
    assert notices == []


def test_an_unreadable_row_is_named(make):
    encoded = [{"bytes": b"damaged", "path": None}] * 5
    data = load_data(make(encoded=encoded))
    with pytest.raises(FewShotError, match=r"can't read the image row 0 of .*skip_unreadable"):
        ImageReader(data, small_preprocess).read(data.classes[1], 0)


def test_splits(datasets, make, tmp_path):
    made = datasets.load_from_disk(make())
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "two")
    with pytest.raises(FewShotError, match=r"several splits \(train, test\); choose one: .*/SPLIT"):
        load_data(tmp_path / "two")
    assert len(load_data(tmp_path / "two" / "test").classes) == 2
    datasets.DatasetDict(test=made).save_to_disk(tmp_path / "one")
    assert len(load_data(tmp_path / "one").classes) == 2


def test_hub_names(datasets, make, monkeypatch):
    made, calls = datasets.load_from_disk(make()), []

    def load_dataset(name, split=None):
        calls.append((name, split))
        return made if split else datasets.DatasetDict(train=made, test=made)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_data("hf:some/one:train").classes) == 2
    with pytest.raises(FewShotError, match="choose one: hf:some/one:SPLIT"):
        load_data("hf:some/one")
    assert calls == [("some/one", "train"), ("some/one", None)]

    def fail(name, split=None):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(FewShotError, match="can't load hf:some/one: ConnectionError: no route; "):
        load_data("hf:some/one")


def test_columns(datasets, make):
    values = (datasets.ClassLabel(names=["x", "y"]), [0, 1, 0, 1, 0])
    complaint = "has 2 columns of type ClassLabel, and none called 'label': it has picture"
    with pytest.raises(FewShotError, match=complaint):
        load_data(make("several", coarse=values))
    data = load_data(make("named", label=values))
    assert [entry.folder for entry in data.classes] == ["x", "y"]
    with pytest.raises(FewShotError, match=r"row 1 of .* has no label"):
        load_data(make("unlabelled", labels=[0, -1, 1, 1, 1]))
    made = datasets.load_from_disk(make("plain")).remove_columns("kind")
    made.save_to_disk(make("plain").with_name("bare"))
    with pytest.raises(FewShotError, match="has no columns of type ClassLabel"):
        load_data(make("plain").with_name("bare"))


def test_damaged_folders(datasets, make):
    folder = make()
    (folder / "state.json").write_text("{")
    with pytest.raises(FewShotError, match=r"data: can't load .*save_to_disk wrote"):
        load_data(folder)


@pytest.mark.parametrize("data", ["hf:some/one", "folder"])
def test_without_the_package(tmp_path, monkeypatch, data):
    monkeypatch.setitem(sys.modules, "datasets", None)
    if data == "folder":
        (tmp_path / "dataset_info.json").write_text("{}")
        data = tmp_path
    with pytest.raises(FewShotError, match=r"needs the package datasets .*\[huggingface\]"):
        load_data(data)


def test_a_column_of_subjects(datasets, make):
    text, number = datasets.Value("string"), datasets.Value("int64")
    path = make(
        patient=(text, ["x", "y", None, "x", "nan"]),
        Age=(number, [40, 41, None, 40, 41]),
        parts=(datasets.Sequence(number), [[1]] * 5),
    )
    data = load_data(path, group_column="patient")
    crop, lake = data.classes
    assert data.group_column == "patient"
    assert (crop.files, lake.files) == (("1", "2", "4"), ("0", "3"))
    assert (crop.groups[0], lake.groups) == ("y", ("x", "x"))
    assert len(set(crop.groups)) == 3  # those without a value are alone
    assert "5 images show 4 subjects by column patient" in data.notes[0]
    assert "2 images without a value" in data.notes[0]
    assert [each.groups[:1] for each in load_data(path, group_column="age").classes] == [
        ("41",),
        ("40",),
    ]
    # The rows without one differ by their groups, and so does the data.
    plain = load_data(path)
    assert (plain.group_column, plain.classes[0].groups) == ("", ())
    assert plain.fingerprint != data.fingerprint
    assert "1 of the 2 values of column patient stand for several images" in plain.notes[0]
    assert "group_column=patient" in plain.notes[0]
    assert not any("patient" in note for note in load_data(path, group_column="none").notes)
    with pytest.raises(FewShotError, match="no column 'lesion'; it has picture, kind, patient"):
        load_data(path, group_column="lesion")
    with pytest.raises(FewShotError, match=r"group_column: column parts of .* name one of texts"):
        load_data(path, group_column="parts")
    with pytest.raises(FewShotError, match=r"group_column: column picture of .* has a Image"):
        load_data(path, group_column="picture")


def test_the_known_column_of_a_data_set(datasets, make):
    made = make(lesion_id=(datasets.Value("string"), list("aabbc")))
    assert load_data(made).group_column == ""  # of satellite images
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["mel", "nv"]),
        "lesion_id": datasets.Value("string"),
    }
    rows = {
        "image": datasets.load_from_disk(str(made)).cast_column(
            "picture", datasets.Image(decode=False)
        )["picture"][:],
        "label": [0, 1, 0, 1, 0],
        "lesion_id": ["p", "q", "p", "q", "r"],
    }
    path = made.parent / "lesions"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(path)
    data = load_data(path)
    assert data.group_column == "lesion_id"
    assert [each.groups for each in data.classes] == [("p", "p", "r"), ("q", "q")]
