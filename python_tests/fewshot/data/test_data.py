"""Image folders, and reading what is in them."""

import functools
import hashlib
import os
import pwd
import shutil
from unittest import mock

import fake_engine
import numpy as np
import pytest
import torch
from fake_engine import small_preprocess
from open_clip.transform import PreprocessCfg
from PIL import Image

from tir_kernels.demo import write_image_folder
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.towers.loading.preprocess import Preprocess


def test_scan_lists_classes_and_images_in_order(make_images):
    root = make_images({"b": 2, "A": 3})
    (root / "b" / "nested").mkdir()
    Image.new("L", (4, 4)).save(root / "b" / "nested" / "x.JPG", format="jpeg")
    for left_out in ("A/notes.txt", "A/.hidden.png", "README.md"):
        (root / left_out).write_text("no image")
    (root / ".cache").mkdir()
    data = load_data(root)
    assert [entry.folder for entry in data.classes] == ["A", "b"]
    assert data.classes[0].files == ("A/000.png", "A/001.png", "A/002.png")
    assert data.classes[1].files == ("b/000.png", "b/001.png", "b/nested/x.JPG")


def test_fingerprint_follows_content_not_place(make_images):
    one = make_images(name="one")
    other = shutil.copytree(one, one.with_name("other"))  # with the times of its files
    before = load_data(one).fingerprint
    assert load_data(other).fingerprint == before
    names = {f"Class{c}": f"kind {c}" for c in "ABCDEF"}
    assert load_data(one, class_names=names).fingerprint != before
    (one / "ClassA" / "000.png").unlink()
    assert load_data(one).fingerprint != before


def test_fingerprint_of_folders_never_changes(tmp_path):
    # A run made with an older version is continued with a newer one.
    for name in ("ClassA/1.png", "ClassB/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(0, 67))
    expected = hashlib.sha256(
        b'["ClassA", "class a", [["ClassA/1.png", 5, 67]]]'
        b'["ClassB", "class b", [["ClassB/2.png", 5, 67]]]'
    )
    assert load_data(tmp_path).fingerprint == expected.hexdigest()


def test_a_demo_goes_on_with_its_images(tmp_path, monkeypatch):
    few = functools.partial(write_image_folder, images_per_class=2)
    monkeypatch.setattr("tir_kernels.demo.write_image_folder", few)
    options = ["--out", str(tmp_path / "out"), "--shots=1", "--queries=1", "--steps=1"]
    for episodes in (1, 2):
        assert fake_engine.run_main(["demo", *options, f"--episodes={episodes}"]) == 0
        journal = (tmp_path / "out" / "episodes.jsonl").read_text()
        assert journal.count('"accuracy"') == 3 * episodes
        shutil.rmtree(tmp_path / "out" / "images")  # drawn again, and the same


def test_unusable_folders(tmp_path, make_images):
    with pytest.raises(FewShotError, match="missing does not exist"):
        load_data(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FewShotError, match=r"file is a file but does not end in \.json, \.csv or \.tsv"
    ):
        load_data(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FewShotError, match="empty has no sub-folders"):
        load_data(tmp_path / "empty")
    with pytest.raises(FewShotError, match=r"no images in the sub-folders.*\.jpg"):
        load_data(make_images({"a": 0, "b": 0}))


def test_too_few_classes_or_images(make_images):
    data = load_data(make_images({"a": 8, "b": 3, "c": 2, "d": 8}))
    with pytest.raises(FewShotError, match=r"ways=5 is more than the 4 classes in .*a, b, c"):
        data.require(ways=5, shots=1, queries=1)
    complaint = r"class 'b' .* has 3 images but 6 are needed .*\(1 more classes have too few\)"
    with pytest.raises(FewShotError, match=complaint):
        data.require(ways=2, shots=5, queries=1)
    data.require(ways=4, shots=1, queries=1)


@pytest.fixture
def reader_of(tmp_path):
    """A reader of images in one class, and the class."""

    def make(images, preprocess=small_preprocess, **options):
        folder = tmp_path / "data" / "class"
        folder.mkdir(parents=True)
        for name, content in images.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                content.save(folder / name)
        data = load_data(tmp_path / "data")
        return ImageReader(data, preprocess, **options), data.classes[0]

    return make


def test_every_kind_of_image_becomes_rgb(reader_of):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    image = Image.fromarray(red)
    reader, entry = reader_of(
        {
            "alpha.png": image.convert("RGBA"),
            "cmyk.tif": image.convert("CMYK"),
            "grey.png": Image.fromarray(np.full((8, 8), 200, np.uint8)),
            "grey16.png": Image.fromarray(np.full((8, 8), 200 << 8, np.uint16)),
            "palette.png": image.quantize(8),
            "rgb.png": image,
        }
    )
    assert len(entry.files) == 6
    for position, name in enumerate(entry.files):
        pixels = reader.read(entry, position)
        assert pixels.shape == (3, 8, 8)
        assert pixels.dtype == torch.uint8
        expected = [200, 200, 200] if "grey" in name else [200, 0, 0]
        difference = pixels.float() - torch.tensor(expected)[:, None, None]
        assert difference.abs().max() <= (2 if "palette" in name else 0)


def test_an_orientation_in_the_metadata_is_left(reader_of, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=image.getexif())
    reader, entry = reader_of({"turned.png": (tmp_path / "turned.png").read_bytes()})
    assert np.array_equal(reader.read(entry, 0).numpy(), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "missing"])
def test_unreadable_images(make_images, damage):
    data = load_data(make_images({"a": 1}))
    path = data.source.root / "a" / "000.png"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"text": b"hello", "truncated": whole[: len(whole) // 2], "empty": b""}[damage]
        )
    with pytest.raises(FewShotError, match=rf"can't read the image {path}: .*skip_unreadable"):
        ImageReader(data, small_preprocess).read(data.classes[0], 0)
    lenient = ImageReader(data, small_preprocess, skip_unreadable=True)
    assert lenient.read(data.classes[0], 0) is None
    assert lenient.read(data.classes[0], 0) is None


def test_memory_is_used_and_bounded(make_images):
    decoded = []

    class Counting(Preprocess):
        def to_pixels(self, image):
            decoded.append(image)
            return super().to_pixels(image)

    data = load_data(make_images({"a": 4}))
    counting = Counting(PreprocessCfg(size=8))
    reader = ImageReader(data, counting, memory_bytes=2 * 3 * 8 * 8)
    for position in (0, 0, 1, 0):
        reader.read(data.classes[0], position)
    assert len(decoded) == 2
    reader.read(data.classes[0], 2)  # 1 was used least recently, so it goes
    reader.read(data.classes[0], 0)
    assert len(decoded) == 3
    reader.read(data.classes[0], 1)
    assert len(decoded) == 4


def test_real_folders(real_data):
    folders = [path for path in sorted(real_data.iterdir()) if path.is_dir()]
    domains = [path for path in folders if path.name != "model"]
    assert domains
    for domain in domains:
        data = load_data(domain)
        data.require(ways=5, shots=5, queries=10)
        for entry in data.classes:
            image = ImageReader(data, small_preprocess).read(entry, 0)
            assert image.shape == (3, 8, 8)
            assert entry.words == entry.words.lower()
            assert "_" not in entry.words


def test_the_home_folder(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = make_images({"a": 2, "b": 2})
    (tmp_path / "words.json").write_text('{"a": "ant", "b": "bee"}')
    data = load_data("~/images", class_names="~/words.json")
    assert [entry.words for entry in data.classes] == ["ant", "bee"]
    assert data.fingerprint == load_data(root, class_names=tmp_path / "words.json").fingerprint
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
    with pytest.raises(FewShotError, match=r"^data: .*no home folder is known.*pass a whole path"):
        load_data("~/images")
    with pytest.raises(FewShotError, match=r"^class_names: .*no home folder is known"):
        load_data(root, class_names="~/words.json")
