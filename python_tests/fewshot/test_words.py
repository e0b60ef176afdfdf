"""The words of classes."""

import pytest

from tir_kernels.fewshot.data import load_data
from tir_kernels.fewshot.errors import FewShotError
from tir_kernels.fewshot.words import (
    _SETS,
    KNOWN_SETS,
    class_words,
    default_words,
    read_class_names,
)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("AnnualCrop", "annual crop"),
        ("SeaLake", "sea lake"),
        ("Tomato___Early_blight", "tomato early blight"),
        ("Spider_mites_Two-spotted_spider_mite", "spider mites two-spotted spider mite"),
        ("n03126707_crane", "crane"),
        ("n02504458_African_elephant", "african elephant"),
        ("001.Black_footed_Albatross", "001 black footed albatross"),
        ("737-200", "737-200"),
        ("2-door_sedan", "2-door sedan"),
        ("grade_1.5", "grade 1.5"),
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


def test_class_names_from_json_and_csv(make_images, tmp_path):
    root = make_images({"mel": 1, "nv": 1})
    as_json, as_csv = tmp_path / "names.json", tmp_path / "names.CSV"
    as_json.write_text('{"mel": "melanoma", "nv": " mole, common ", "bcc": "not here"}')
    as_csv.write_text('\ufefffolder,words\nmel,melanoma\n\nnv,"mole, common"\n', encoding="utf-8")
    for path in (as_json, as_csv):
        data = load_data(root, class_names=path)
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
        load_data(root, class_names={"Annual-Crop": "crop", "Forest": "forest"})
    with pytest.raises(FewShotError, match="'AnnualCrop' and 'Forest' have the same words 'land'"):
        load_data(root, class_names={"AnnualCrop": "land", "Forest": "land"})


PLANTVILLAGE = {
    "Apple___Apple_scab": "apple leaf with scab",
    "Apple___Cedar_apple_rust": "apple leaf with cedar apple rust",
    "Cherry_(including_sour)___healthy": "healthy cherry leaf",
    "Corn_(maize)___Cercospora_leaf_spot Gray_leaf_spot": "corn leaf with gray leaf spot",
    "Corn_(maize)___Common_rust_": "corn leaf with common rust",
    "Grape___Esca_(Black_Measles)": "grape leaf with black measles",
    "Grape___Leaf_blight_(Isariopsis_Leaf_Spot)": "grape leaf with leaf blight",
    "Orange___Haunglongbing_(Citrus_greening)": "orange leaf with citrus greening",
    "Pepper,_bell___healthy": "healthy bell pepper leaf",
    "Pepper,_bell___Bacterial_spot": "bell pepper leaf with bacterial spot",
    "Tomato___Late_blight": "tomato leaf with late blight",
    "Tomato___Spider_mites Two-spotted_spider_mite": "tomato leaf with two-spotted spider mites",
    "Tomato___Tomato_mosaic_virus": "tomato leaf with mosaic virus",
    "Tomato___healthy": "healthy tomato leaf",
}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("plantvillage", PLANTVILLAGE),
        ("eurosat", {"AnnualCrop": "annual crop land", "SeaLake": "sea or lake", "River": "river"}),
        ("isic2018", {"mel": "melanoma", "NV": "melanocytic nevus", "akiec": "actinic keratosis"}),
        ("chestx", {"No_Finding": "no finding", "Mass": "mass"}),
    ],
)
def test_known_sets_are_recognised(key, expected):
    words, note = class_words(list(expected))
    assert words == expected
    first = next(iter(expected))
    assert f"those of {key}: {first} is {expected[first]!r}" in note
    assert class_words(list(expected), key) == (expected, "")


def test_copies_of_a_set_may_spell_it_otherwise():
    words, note = class_words(
        ["Tomato___Spider_mites_Two-spotted_spider_mite", "Pepper__bell___healthy"]
    )
    assert list(words.values()) == [
        "tomato leaf with two-spotted spider mites",
        "healthy bell pepper leaf",
    ]
    assert "plantvillage" in note


def test_a_set_is_taken_only_if_it_has_all_classes(make_images):
    words, note = class_words(["SeaLake", "River", "Desert"])
    assert (words["SeaLake"], note) == ("sea lake", "")
    with pytest.raises(FewShotError, match="no words for class 'Desert'"):
        class_words(["SeaLake", "River", "Desert"], "eurosat")
    with pytest.raises(FewShotError, match=r"class 'SeeLake' \(it has 'SeaLake'\)"):
        class_words(["SeeLake"], "eurosat")
    root = make_images({"SeaLake": 1, "River": 1})
    assert load_data(root).notes == (
        "class names are those of eurosat: River is 'river', SeaLake is 'sea or lake'",
    )
    given = load_data(root, class_names={"SeaLake": "water", "River": "stream"})
    assert [entry.words for entry in given.classes] == ["stream", "water"]
    assert given.notes == ()


def test_words_of_known_sets_are_words_and_differ():
    for key in KNOWN_SETS:
        words = list(_SETS[key].values())
        assert len(set(words)) == len(words)
        for text in words:
            assert text == text.lower()
            assert not set(text) & set("_(),")


def test_real_folders_have_known_names(real_data):
    for key, folder in (("plantvillage",) * 2, ("eurosat",) * 2, ("isic2018",) * 2):
        (note,) = load_data(real_data / folder).notes
        assert f"those of {key}" in note
    (note,) = load_data(real_data / "chestx_64").notes
    assert "those of chestx" in note
    (note,) = load_data(real_data / "tinyimagenet").notes
    assert "n03126707_crane" not in note  # one of twenty, of which six are shown
    assert "n01742172_boa_constrictor is 'boa constrictor'" in note
    assert note.endswith("(20 in all)")
