"""ChestX-ray8 and ChestX-ray14: chest X-rays with the findings in them (arXiv 1705.02315)."""

from tir_kernels.fewshot.data.known.protocol import KnownSet, KnownTable

CHESTX = KnownSet(
    words={
        "Atelectasis": "atelectasis",
        "Cardiomegaly": "cardiomegaly",
        "Consolidation": "consolidation",
        "Edema": "edema",
        "Effusion": "effusion",
        "Emphysema": "emphysema",
        "Fibrosis": "fibrosis",
        "Hernia": "hernia",
        "Infiltration": "infiltration",
        "Mass": "mass",
        "No_Finding": "no finding",
        "Nodule": "nodule",
        "Pleural_Thickening": "pleural thickening",
        "Pneumonia": "pneumonia",
        "Pneumothorax": "pneumothorax",
    },
    table=KnownTable(
        file="Image Index",
        label="Finding Labels",
        # The seven of the cross-domain few-shot benchmark (arXiv 1912.07200).
        kept=(
            "Atelectasis",
            "Cardiomegaly",
            "Effusion",
            "Infiltration",
            "Mass",
            "Nodule",
            "Pneumothorax",
        ),
    ),
    # From the program of arXiv 2605.25799.
    template="a chest x-ray photo of a {}.",
    title="ChestX of the cross-domain few-shot benchmark",
    images=25_848,
    # Rows of Data_Entry_2017.csv with this finding alone, as the benchmark's program takes them.
    class_images={
        "Atelectasis": 4215,
        "Cardiomegaly": 1093,
        "Effusion": 3955,
        "Infiltration": 9547,
        "Mass": 2139,
        "Nodule": 2705,
        "Pneumothorax": 2194,
    },
    group_column="Patient ID",
)
