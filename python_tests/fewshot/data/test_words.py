"""The words of classes."""

import os
import unicodedata

import pytest

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.known import known_set, known_sets
from tir_kernels.fewshot.data.words import (
    class_words,
    default_words,
    published_note,
    raw_words,
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AnnualCrop", "AnnualCrop"),
        ("Apple___Apple_scab", "Apple Apple scab"),
        ("Corn_(maize)___Common_rust_", "Corn (maize) Common rust"),
        ("Spider_mites Two-spotted_spider_mite", "Spider mites Two-spotted spider mite"),
        ("001.Black_footed_Albatross", "001.Black footed Albatross"),
        ("MEL", "MEL"),
        ("___", "___"),
    ],
)
def test_raw_words(name, words):
    assert raw_words(name) == words


def test_raw_words_go_before_those_of_a_known_set(make_images):
    for known in known_sets().values():
        words, note = class_words(list(known.words), "raw")
        assert words == {name: raw_words(name) for name in known.words}
        assert note.startswith("class names are raw: ")
    root = make_images({"SeaLake": 1, "HerbaceousVegetation": 1})
    raw = load_data(root, class_names="raw")
    assert [entry.words for entry in raw.classes] == ["HerbaceousVegetation", "SeaLake"]
    assert "HerbaceousVegetation is 'HerbaceousVegetation'" in raw.notes[0]
    assert " as published " in raw.notes[1]  # it is that set all the same
    assert raw.fingerprint != load_data(root).fingerprint


def test_raw_words_must_be_words_and_differ():
    with pytest.raises(FewShotError, match=r"'leaf rust' and 'Leaf_rust' have the same words"):
        class_words(["leaf rust", "Leaf_rust"], "raw")
    with pytest.raises(FewShotError, match="is not UTF-8"):
        class_words([os.fsdecode(b"for\xeat"), "field"], "raw")


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
        f"{root} has 2 images, EuroSAT as published 27,000; without its classes AnnualCrop, "
        "Forest, HerbaceousVegetation, Highway, ... (8 of 10); by class: River 1 of 2,500, SeaLake "
        "1 of 3,000",
    )
    given = load_data(root, class_names={"SeaLake": "water", "River": "stream"})
    assert [entry.words for entry in given.classes] == ["stream", "water"]
    assert given.notes == ()


def test_whole_sets_have_the_published_numbers():
    totals = {"eurosat": 27_000, "isic2018": 10_015, "plantvillage": 54_305, "chestx": 25_848}
    for name, total in totals.items():
        published = known_set(name).class_images
        of_task = known_set(name).words.keys()
        if name == "chestx":  # of whose classes the benchmark takes seven
            of_task = known_set(name).table.kept
        assert set(published) == set(of_task)
        assert sum(published.values()) == total == known_set(name).images
        # As copies spell them.
        counts = {each.lower(): count for each, count in published.items()}
        assert published_note("here", counts, None) == ""
        assert published_note("here", counts, name) == ""
    assert len(known_set("plantvillage").words) == 38


def test_what_differs_from_the_published_numbers_is_said():
    counts = {**known_set("isic2018").class_images, "NV": 6700, "DF": 120}
    note = "here has 10,015 images, ISIC 2018 task 3 as published 10,015"
    by_class = "; by class: DF 120 of 115, NV 6,700 of 6,705"  # with the same total
    assert published_note("here", counts, None) == note + by_class
    counts["DF"] = 0
    assert published_note("here", counts, None) == (
        note.replace("10,015 images", "9,895 images")
        + "; without its classes DF (1 of 7); by class: NV 6,700 of 6,705"
    )
    # Words of the user's own, classes of no set, and others than those of the benchmark's task.
    assert published_note("here", counts, {"NV": "mole"}) == ""
    assert published_note("here", {"cat": 3}, None) == ""
    assert published_note("here", {"Mass": 3, "No Finding": 2}, None) == ""
    assert published_note("here", {"Mass": 3, "Nodule": 2}, None) == (
        "here has 5 images, ChestX of the cross-domain few-shot benchmark as published 25,848; "
        "without its classes Atelectasis, Cardiomegaly, Effusion, Infiltration, ... (5 of 7); by "
        "class: Mass 3 of 2,139, Nodule 2 of 2,705"
    )


def test_words_of_known_sets_are_words_and_differ():
    for each in known_sets().values():
        words = list(each.words.values())
        assert len(set(words)) == len(words)
        for text in words:
            assert text == text.lower()
            assert not set(text) & set("_(),")


def test_real_folders_have_known_names(real_data):
    for key, folder in (("plantvillage",) * 2, ("eurosat",) * 2, ("isic2018",) * 2):
        note, published = load_data(real_data / folder).notes
        assert f"those of {key}" in note
        assert " as published " in published
    (note,) = load_data(real_data / "chestx_64").notes  # with classes beside the benchmark's
    assert "those of chestx" in note
    (note,) = load_data(real_data / "tinyimagenet").notes
    assert "n03126707_crane" not in note  # one of twenty, of which six are shown
    assert "n01742172_boa_constrictor is 'boa constrictor'" in note
    assert note.endswith("(20 in all)")


@pytest.mark.parametrize(
    "names",
    [
        ("737-200", "747-100"),
        ("707-320", "727-200", "737-200"),
        ("2-door_sedan", "4-door_sedan"),
        ("2-door_sedan", "4-wheel_drive"),
        ("1_hump camel", "2_hump camel"),  # both would be "hump camel"
        ("1_cat", "1_dog"),
        ("1_cat", "dog"),
        ("1_cat", "2-dog"),
        ("1" * 5000 + "_cat", "2_dog"),
    ],
)
def test_numbers_that_belong_to_names_stay(names):
    words, note = class_words(names)
    assert words == {name: default_words(name) for name in names}
    assert all(text[0] == name[0] for name, text in words.items())
    assert note == ""


@pytest.mark.parametrize(
    "names",
    [
        ("001.Black_cat", "002.Big_dog"),
        ("017.Black_cat", "120.Big_dog"),
        ("0-Black_cat", "1-Big_dog"),
        ("05-Black_cat", "12-Big_dog"),
        ("3 - BlackCat", "9 - BigDog"),
    ],
)
def test_numbers_that_count_the_classes_go_and_are_shown(names):
    words, note = class_words(names)
    assert list(words.values()) == ["black cat", "big dog"]
    assert note == (
        f"class names are without the numbers in front: {names[0]} is 'black cat', {names[1]} is "
        "'big dog'"
    )


@pytest.mark.parametrize("names", [("7", "11"), ("n03126707", "n02504458")])
def test_names_that_say_nothing(names):
    words, note = class_words(names)
    assert list(words) == list(words.values()) == list(names)
    assert f"names are numbers such as {names[0]}" in note
    assert class_words(names, dict.fromkeys(names[:1], "cat") | {names[1]: "dog"})[1] == ""


@pytest.mark.parametrize("other", ["Sea Lake", " sea  lake", "SEA\u00a0LAKE", "sea\tlake"])
def test_words_that_a_tokenizer_takes_for_the_same(other):
    with pytest.raises(FewShotError, match="'a' and 'b' have the same words"):
        class_words(["a", "b"], {"a": "sea lake", "b": other})


def test_forms_of_unicode_are_the_same():
    composed, parted = (unicodedata.normalize(form, "forêt") for form in ("NFC", "NFD"))
    assert class_words([composed], {parted: "forest"})[0] == {composed: "forest"}
    assert class_words([parted], {composed: "forest"})[0] == {parted: "forest"}
    with pytest.raises(FewShotError, match="have the same words"):
        class_words(["a", "b"], {"a": composed, "b": parted})
    with pytest.raises(FewShotError, match="is there twice, in different forms of Unicode"):
        class_words(["a"], {composed: "wood", parted: "forest"})


@pytest.mark.parametrize("text", ["", " ", "\ud800", 3, None])
def test_words_that_no_prompt_can_hold(text):
    with pytest.raises(FewShotError, match="class 'a' has no words that a prompt can hold"):
        class_words(["a"], {"a": text})
    if text == "":
        with pytest.raises(FewShotError, match="class '' has no words that a prompt can hold"):
            class_words([text])


def test_class_names_by_semicolon_and_tab(tmp_path):
    for name, delimiter in (("a.csv", ";"), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"folder{delimiter}words\nnv{delimiter}mole, common\n")
        assert read_class_names(tmp_path / name) == {"nv": "mole, common"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": "x", "a": "y"}', "has 'a' twice"),
        ('{"a":' * 100_000, "nested too deeply"),
        (f'{{"a": {"1" * 5000}}}', "not valid JSON: Exceeds the limit"),
        (f'{{"a": "{"x" * 200}"}}', "larger than 100 bytes"),
    ],
)
def test_class_names_are_read_within_bounds(tmp_path, monkeypatch, text, complaint):
    if "larger" in complaint:
        monkeypatch.setattr("tir_kernels.fewshot.data.words.NAMES_BYTES", 100)
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(FewShotError, match=rf"class_names: .*names\.json.*{complaint}"):
        read_class_names(tmp_path / "names.json")


def test_class_names_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "endless.csv").symlink_to("/dev/zero")
    (tmp_path / "long.csv").write_text("a," + "x" * 200_000)
    for name in ("pipe.json", "endless.csv"):
        with pytest.raises(FewShotError, match=f"class_names: can't read .*{name}.*regular file"):
            read_class_names(tmp_path / name)
    with pytest.raises(FewShotError, match=r"class_names: line 1 of .*: field larger than"):
        read_class_names(tmp_path / "long.csv")
    with pytest.raises(FewShotError, match=r"class_names: can't read .*File name too long"):
        read_class_names("long" * 1000 + ".csv")


def test_known_templates_hold_the_name_once():
    templates = {name: known.template for name, known in known_sets().items()}
    assert templates == {
        "plantvillage": "a crop disease photo of a {}.",
        "eurosat": "a centered satellite photo of {}.",
        "isic2018": "a skin lesion photo of a {}.",
        "chestx": "a chest x-ray photo of a {}.",
    }
