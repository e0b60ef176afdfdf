"""The words a prompt uses for a class: given, known for a data set, or read from its name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from tir_kernels.fewshot.errors import FewShotError, first_line

_EUROSAT = {
    "AnnualCrop": "annual crop land",
    "Forest": "forest",
    "HerbaceousVegetation": "herbaceous vegetation land",
    "Highway": "highway or road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "river",
    "SeaLake": "sea or lake",
}

_ISIC2018 = {
    "AKIEC": "actinic keratosis",
    "BCC": "basal cell carcinoma",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "VASC": "vascular lesion",
}

_CHESTX = (
    "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia Infiltration "
    "Mass No_Finding Nodule Pleural_Thickening Pneumonia Pneumothorax"
)

_PLANTVILLAGE = """
Apple___Apple_scab
Apple___Black_rot
Apple___Cedar_apple_rust
Apple___healthy
Blueberry___healthy
Cherry_(including_sour)___Powdery_mildew
Cherry_(including_sour)___healthy
Corn_(maize)___Cercospora_leaf_spot Gray_leaf_spot
Corn_(maize)___Common_rust_
Corn_(maize)___Northern_Leaf_Blight
Corn_(maize)___healthy
Grape___Black_rot
Grape___Esca_(Black_Measles)
Grape___Leaf_blight_(Isariopsis_Leaf_Spot)
Grape___healthy
Orange___Haunglongbing_(Citrus_greening)
Peach___Bacterial_spot
Peach___healthy
Pepper,_bell___Bacterial_spot
Pepper,_bell___healthy
Potato___Early_blight
Potato___Late_blight
Potato___healthy
Raspberry___healthy
Soybean___healthy
Squash___Powdery_mildew
Strawberry___Leaf_scorch
Strawberry___healthy
Tomato___Bacterial_spot
Tomato___Early_blight
Tomato___Late_blight
Tomato___Leaf_Mold
Tomato___Septoria_leaf_spot
Tomato___Spider_mites Two-spotted_spider_mite
Tomato___Target_Spot
Tomato___Tomato_Yellow_Leaf_Curl_Virus
Tomato___Tomato_mosaic_virus
Tomato___healthy
"""

# Where the folder's name has two names for one disease, or misspells it.
_DISEASES = {
    "Cercospora_leaf_spot Gray_leaf_spot": "gray leaf spot",
    "Esca_(Black_Measles)": "black measles",
    "Haunglongbing_(Citrus_greening)": "citrus greening",
    "Spider_mites Two-spotted_spider_mite": "two-spotted spider mites",
}


def _plant_words(folder: str) -> str:
    plant, _, state = folder.partition("___")
    # "Pepper,_bell" is a bell pepper; what stands in brackets explains the rest.
    parts = re.sub(r"_\(.*\)", "", plant).split(",_")
    plant = " ".join(reversed(parts)).lower()
    if state == "healthy":
        return f"healthy {plant} leaf"
    disease = re.sub(r"_\(.*\)", "", state)
    disease = _DISEASES.get(state, disease.strip("_").replace("_", " ").lower())
    return f"{plant} leaf with {disease.removeprefix(f'{plant} ')}"


def default_words(folder: str) -> str:
    """The words of a class whose name is all that is known.

    A leading index or WordNet id goes, camel case and underscores become spaces, all lower case:
    ``AnnualCrop`` -> "annual crop", ``n03126707_crane`` -> "crane".
    """
    words = re.sub(r"^(n\d{8}|\d+)[\s._-]+", "", folder)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", words)
    words = re.sub(r"[\s._]+", " ", words).strip().lower()
    return words or folder


def _spelling(name: str) -> str:
    """What copies of a data set, which differ in case, spaces and underscores, have in common."""
    return re.sub(r"[\W_]+", " ", name).strip().lower()


_SETS: dict[str, Mapping[str, str]] = {
    "plantvillage": {name: _plant_words(name) for name in _PLANTVILLAGE.strip().splitlines()},
    "eurosat": _EUROSAT,
    "isic2018": _ISIC2018,
    "chestx": {name: default_words(name) for name in _CHESTX.split()},
}
KNOWN_SETS = tuple(_SETS)


def class_words(
    names: Sequence[str], given: Mapping[str, str] | str | Path | None = None
) -> tuple[dict[str, str], str]:
    """The words of each class, and a note on where they come from.

    Args:
        names: The classes' names: those of folders, or labels of a list.
        given: The words: a mapping from name to words, a JSON or CSV file that holds one, or one of
            ``KNOWN_SETS``. ``None``: those of the known set that has all the names, and without
            such a set ``default_words``.

    Returns:
        Name -> words, and a line for the user where a known set was recognised, else "".

    Raises:
        FewShotError: A class has no words, or the same words as another.
    """
    note = ""
    if given is None:
        known = next((key for key in KNOWN_SETS if len(_known(key, names)) == len(names)), None)
        if known is None:
            return _distinct({name: default_words(name) for name in names}), note
        given = known
        note = f"class names are those of {known}: {_examples(_known(known, names))}"
    if isinstance(given, str) and given in _SETS:
        # The set's own names stand beside those found, for the hint at a name that is not known.
        given = {**_SETS[given], **_known(given, names)}
    elif not isinstance(given, Mapping):
        given = read_class_names(given)
    # Names that are not there are fine: one map may serve several subsets.
    for name in names:
        if name not in given:
            close = get_close_matches(name, given, n=1)
            hint = f" (it has {close[0]!r})" if close else ""
            raise FewShotError(f"--class-names: no words for class {name!r}{hint}; add them")
    return _distinct({name: given[name] for name in names}), note


def _known(key: str, names: Iterable[str]) -> dict[str, str]:
    spellings = {_spelling(name): words for name, words in _SETS[key].items()}
    return {name: spellings[_spelling(name)] for name in names if _spelling(name) in spellings}


def _examples(words: Mapping[str, str], limit: int = 2) -> str:
    shown = [f"{name} is {text!r}" for name, text in words.items()][:limit]
    return ", ".join(shown) + (", ..." if len(words) > limit else "")


def _distinct(words: dict[str, str]) -> dict[str, str]:
    owner: dict[str, str] = {}
    for name, text in words.items():
        if text in owner:
            raise FewShotError(
                f"classes {owner[text]!r} and {name!r} have the same words {text!r}, so no prompt "
                "can tell them apart; give them different words with --class-names FILE"
            )
        owner[text] = name
    return words


def read_class_names(path: str | Path) -> dict[str, str]:
    """Read a class-name map: JSON (an object) or CSV (two columns), from folder name to words.

    A CSV file may start with a header line whose first cell is ``folder``.

    Raises:
        FewShotError: The file can't be read or is not such a map.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FewShotError(f"--class-names: can't read {path}: {first_line(error)}") from error
    if path.suffix.lower() == ".json":
        try:
            names = json.loads(text)
        except json.JSONDecodeError as error:
            raise FewShotError(f"--class-names: {path} is not valid JSON: {error}") from error
        if not isinstance(names, dict):
            raise FewShotError(f'--class-names: {path} must hold an object {{"folder": "words"}}')
    elif path.suffix.lower() == ".csv":
        names = _read_csv(path, text)
    else:
        raise FewShotError(
            f"--class-names: {path} must end in .json or .csv, or be one of {', '.join(KNOWN_SETS)}"
        )
    for folder, words in names.items():
        if not isinstance(words, str) or not words.strip():
            raise FewShotError(f"--class-names: {path} has no words for {folder!r}; add them")
    return {folder: words.strip() for folder, words in names.items()}


def _read_csv(path: Path, text: str) -> dict[str, str]:
    names: dict[str, str] = {}
    reader = csv.reader(text.splitlines())
    for row in reader:
        cells = [cell.strip() for cell in row]
        is_header = reader.line_num == 1 and cells and cells[0].lower() == "folder"
        if not any(cells) or is_header:
            continue
        if len(cells) != 2:
            raise FewShotError(
                f"--class-names: line {reader.line_num} of {path} has {len(cells)} columns, not "
                "the 2 of 'folder,words'; put words that contain a comma in double quotes"
            )
        if cells[0] in names:
            raise FewShotError(
                f"--class-names: line {reader.line_num} of {path} names {cells[0]!r} again; "
                "keep one line per folder"
            )
        names[cells[0]] = cells[1]
    return names
