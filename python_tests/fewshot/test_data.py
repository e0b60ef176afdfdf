"""Image folders, class names, decoding."""

import numpy as np
import pytest
import torch
from fake_engine import small_preprocess
from PIL import Image

from tir_kernels.fewshot.data import ImageFolderData, ImageReader, default_words, read_class_names
from tir_kernels.fewshot.errors import FewShotError


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("AnnualCrop", "annual crop"),
        ("SeaLake", "sea lake"),
        ("Tomato___Early_blight", "tomato early blight"),
        ("Spider_mites_Two-spotted_spider_mite", "spider mites two-spotted spider mite"),
        ("n03126707_crane", "crane"),
        ("n02504458_African_elephant", "african elephant"),
        ("001.Black_footed_Albatross", "black footed albatross"),
        ("No_Finding", "no finding"),
        ("RGBImage", "rgb image"),
        ("mel", "mel"),
        ("7", "7"),
        ("n03126707", "n03126707"),
        ("___", "___"),
    ],
)
def test_default_words(folder, words):
    assert default_words(folder) == words


def test_scan_lists_classes_and_images_in_order(make_images):
    root = make_images({"b": 2, "A": 3})
    (root / "b" / "nested").mkdir()
    Image.new("L", (4, 4)).save(root / "b" / "nested" / "x.JPG", format="jpeg")
    for left_out in ("A/notes.txt", "A/.hidden.png", "README.md"):
        (root / left_out).write_text("no image")
    (root / ".cache").mkdir()
    data = ImageFolderData.scan(root)
    assert [entry.folder for entry in data.classes] == ["A", "b"]
    assert data.classes[0].files == ("A/000.png", "A/001.png", "A/002.png")
    assert data.classes[1].files == ("b/000.png", "b/001.png", "b/nested/x.JPG")


def test_fingerprint_follows_content_not_place(make_images):
    one, other = make_images(name="one"), make_images(name="other")
    before = ImageFolderData.scan(one).fingerprint
    assert ImageFolderData.scan(other).fingerprint == before
    names = {f"Class{c}": f"kind {c}" for c in "ABCDEF"}
    assert ImageFolderData.scan(one, names).fingerprint != before
    (one / "ClassA" / "000.png").unlink()
    assert ImageFolderData.scan(one).fingerprint != before


def test_class_names_from_json_and_csv(make_images, tmp_path):
    root = make_images({"mel": 1, "nv": 1})
    as_json, as_csv = tmp_path / "names.json", tmp_path / "names.CSV"
    as_json.write_text('{"mel": "melanoma", "nv": " mole, common ", "bcc": "not here"}')
    as_csv.write_text('\ufefffolder,words\nmel,melanoma\n\nnv,"mole, common"\n', encoding="utf-8")
    for path in (as_json, as_csv):
        data = ImageFolderData.scan(root, path)
        assert [entry.words for entry in data.classes] == ["melanoma", "mole, common"]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", 'must hold an object {"folder": "words"}'),
        ("a.json", '{"mel": ""}', "no words for 'mel'"),
        ("a.json", '{"mel": 3}', "no words for 'mel'"),
        ("a.csv", "mel,melanoma\nnv,mole, common\n", "line 2 of .* has 3 columns"),
        ("a.csv", "mel,melanoma\nmel,mole\n", "line 2 of .* names 'mel' again"),
        ("a.txt", "mel melanoma", "must end in .json or .csv"),
        ("missing.json", None, "can't read .*missing.json"),
    ],
)
def test_bad_class_name_files(tmp_path, name, text, complaint):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(FewShotError, match=complaint):
        read_class_names(tmp_path / name)


def test_class_names_must_cover_every_class_and_differ(make_images):
    root = make_images({"AnnualCrop": 1, "Forest": 1})
    with pytest.raises(FewShotError, match=r"no words for .*'AnnualCrop' \(it has 'Annual-Crop'\)"):
        ImageFolderData.scan(root, {"Annual-Crop": "crop", "Forest": "forest"})
    with pytest.raises(FewShotError, match="'AnnualCrop' and 'Forest' have the same words 'land'"):
        ImageFolderData.scan(root, {"AnnualCrop": "land", "Forest": "land"})


def test_unusable_folders(tmp_path, make_images):
    with pytest.raises(FewShotError, match="missing does not exist"):
        ImageFolderData.scan(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FewShotError, match="file is a file"):
        ImageFolderData.scan(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FewShotError, match="empty has no sub-folders"):
        ImageFolderData.scan(tmp_path / "empty")
    with pytest.raises(FewShotError, match=r"no images in the sub-folders.*\.jpg"):
        ImageFolderData.scan(make_images({"a": 0, "b": 0}))


def test_too_few_classes_or_images(make_images):
    data = ImageFolderData.scan(make_images({"a": 8, "b": 3, "c": 2, "d": 8}))
    with pytest.raises(FewShotError, match=r"--ways 5 is more than the 4 class folders.*a, b, c"):
        data.require(ways=5, shots=1, queries=1)
    complaint = r"class 'b' .* has 3 images but 6 are needed .*\(1 more classes have too few\)"
    with pytest.raises(FewShotError, match=complaint):
        data.require(ways=2, shots=5, queries=1)
    data.require(ways=4, shots=1, queries=1)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "rgb.png")
    Image.fromarray(red).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(red).convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((8, 8), 200 << 8, np.uint16)).save(tmp_path / "grey16.png")
    reader = ImageReader(tmp_path, small_preprocess)
    for name in ("rgb", "palette", "alpha"):
        image = reader.read(f"{name}.png")
        assert image.shape == (3, 8, 8)
        torch.testing.assert_close(
            image.mean((1, 2)), torch.tensor([200 / 255, 0, 0]), atol=0.03, rtol=0
        )
    for name in ("grey", "grey16"):
        torch.testing.assert_close(
            reader.read(f"{name}.png"), torch.full((3, 8, 8), 200 / 255), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "missing"])
def test_unreadable_images(make_images, damage):
    root = make_images({"a": 1}) / "a"
    path = root / "000.png"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(
            {"text": b"hello", "truncated": whole[: len(whole) // 2], "empty": b""}[damage]
        )
    with pytest.raises(FewShotError, match=r"can't read the image .*000\.png: .*--skip-unreadable"):
        ImageReader(root, small_preprocess).read("000.png")
    lenient = ImageReader(root, small_preprocess, skip_unreadable=True)
    assert lenient.read("000.png") is None
    assert lenient.read("000.png") is None


def test_cache_is_used_and_bounded(make_images):
    root = make_images({"a": 4}) / "a"
    decoded = []

    def preprocess(image):
        decoded.append(image)
        return small_preprocess(image)

    size = 3 * 8 * 8 * 4
    reader = ImageReader(root, preprocess, cache_bytes=2 * size)
    for name in ("000.png", "000.png", "001.png", "000.png"):
        reader.read(name)
    assert len(decoded) == 2
    reader.read("002.png")  # 001 was used least recently, so it goes
    reader.read("000.png")
    assert len(decoded) == 3
    reader.read("001.png")
    assert len(decoded) == 4


def test_real_folders(real_data):
    folders = [path for path in sorted(real_data.iterdir()) if path.is_dir()]
    domains = [path for path in folders if path.name != "model"]
    assert domains
    for domain in domains:
        data = ImageFolderData.scan(domain)
        data.require(ways=5, shots=5, queries=10)
        for entry in data.classes:
            image = ImageReader(domain, small_preprocess).read(entry.files[0])
            assert image.shape == (3, 8, 8)
            assert entry.words == entry.words.lower()
            assert "_" not in entry.words
