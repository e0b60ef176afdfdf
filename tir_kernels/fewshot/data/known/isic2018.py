"""ISIC 2018, task 3: dermoscopic images of seven kinds of skin lesions (arXiv 1902.03368)."""

from tir_kernels.fewshot.data.known.protocol import KnownSet, KnownTable

ISIC2018 = KnownSet(
    words={
        "AKIEC": "actinic keratosis",
        "BCC": "basal cell carcinoma",
        "BKL": "benign keratosis",
        "DF": "dermatofibroma",
        "MEL": "melanoma",
        "NV": "melanocytic nevus",
        "VASC": "vascular lesion",
    },
    table=KnownTable(one_hot=("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")),
    # From the program of arXiv 2605.25799, which writes "lession".
    template="a skin lesion photo of a {}.",
    title="ISIC 2018 task 3",
    images=10_015,
    class_images={
        "AKIEC": 327,
        "BCC": 514,
        "BKL": 1099,
        "DF": 115,
        "MEL": 1113,
        "NV": 6705,
        "VASC": 142,
    },
    group_column="lesion_id",  # in HAM10000_metadata, which lists the same images
)
