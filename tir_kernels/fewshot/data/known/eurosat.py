"""EuroSAT: satellite images of ten kinds of land use (arXiv 1709.00029)."""

from tir_kernels.fewshot.data.known.protocol import KnownSet

EUROSAT = KnownSet(
    words={
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
    },
    # The first of CLIP's prompts for it, and the one of CoOp and Tip-Adapter.
    template="a centered satellite photo of {}.",
    title="EuroSAT",
    images=27_000,
    class_images={
        "AnnualCrop": 3000,
        "Forest": 3000,
        "HerbaceousVegetation": 3000,
        "Highway": 2500,
        "Industrial": 2500,
        "Pasture": 2000,
        "PermanentCrop": 2500,
        "Residential": 3000,
        "River": 2500,
        "SeaLake": 3000,
    },
)
