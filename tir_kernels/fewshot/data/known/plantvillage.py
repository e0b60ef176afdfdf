"""PlantVillage: leaves that are healthy or have one of several diseases (arXiv 1511.08060)."""

import re

from tir_kernels.fewshot.data.known.protocol import KnownSet

_FOLDERS = """
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


PLANTVILLAGE = KnownSet(
    words={name: _words(name) for name in _FOLDERS.strip().splitlines()},
    title="PlantVillage",
    images=54_306,
)
