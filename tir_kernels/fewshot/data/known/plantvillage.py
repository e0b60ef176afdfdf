"""PlantVillage: leaves that are healthy or have one of several diseases (arXiv 1511.08060)."""

import re

from tir_kernels.fewshot.data.known.protocol import KnownSet

# Each folder with the number of its images, as in the colour images of the authors' repository
# (spMohanty/PlantVillage-Dataset): 54,305 in all, where the paper counts 54,306.
_FOLDERS = """
630 Apple___Apple_scab
621 Apple___Black_rot
275 Apple___Cedar_apple_rust
1645 Apple___healthy
1502 Blueberry___healthy
1052 Cherry_(including_sour)___Powdery_mildew
854 Cherry_(including_sour)___healthy
513 Corn_(maize)___Cercospora_leaf_spot Gray_leaf_spot
1192 Corn_(maize)___Common_rust_
985 Corn_(maize)___Northern_Leaf_Blight
1162 Corn_(maize)___healthy
1180 Grape___Black_rot
1383 Grape___Esca_(Black_Measles)
1076 Grape___Leaf_blight_(Isariopsis_Leaf_Spot)
423 Grape___healthy
5507 Orange___Haunglongbing_(Citrus_greening)
2297 Peach___Bacterial_spot
360 Peach___healthy
997 Pepper,_bell___Bacterial_spot
1478 Pepper,_bell___healthy
1000 Potato___Early_blight
1000 Potato___Late_blight
152 Potato___healthy
371 Raspberry___healthy
5090 Soybean___healthy
1835 Squash___Powdery_mildew
1109 Strawberry___Leaf_scorch
456 Strawberry___healthy
2127 Tomato___Bacterial_spot
1000 Tomato___Early_blight
1909 Tomato___Late_blight
952 Tomato___Leaf_Mold
1771 Tomato___Septoria_leaf_spot
1676 Tomato___Spider_mites Two-spotted_spider_mite
1404 Tomato___Target_Spot
5357 Tomato___Tomato_Yellow_Leaf_Curl_Virus
373 Tomato___Tomato_mosaic_virus
1591 Tomato___healthy
"""

# Where the folder's name has two names for one disease, or misspells it.
_DISEASES = {
    "Cercospora_leaf_spot Gray_leaf_spot": "gray leaf spot",
    "Esca_(Black_Measles)": "black measles",
    "Haunglongbing_(Citrus_greening)": "citrus greening",
    "Spider_mites Two-spotted_spider_mite": "two-spotted spider mites",
}


def _words(folder: str) -> str:
    plant, _, state = folder.partition("___")
    # "Pepper,_bell" is a bell pepper; what stands in brackets explains the rest.
    parts = re.sub(r"_\(.*\)", "", plant).split(",_")
    plant = " ".join(reversed(parts)).lower()
    if state == "healthy":
        return f"healthy {plant} leaf"
    disease = re.sub(r"_\(.*\)", "", state)
    disease = _DISEASES.get(state, disease.strip("_").replace("_", " ").lower())
    return f"{plant} leaf with {disease.removeprefix(f'{plant} ')}"


_IMAGES = {
    name: int(count)
    for count, _, name in (line.partition(" ") for line in _FOLDERS.strip().splitlines())
}

PLANTVILLAGE = KnownSet(
    words={name: _words(name) for name in _IMAGES},
    # From the program of arXiv 2605.25799, whose prompts are "a crop disease photo of a NAME.".
    template="a crop disease photo of a {}.",
    title="PlantVillage",
    images=sum(_IMAGES.values()),
    class_images=_IMAGES,
)
