"""What is white in images of more than 8 bits, when a classifier reads them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tir_kernels.fewshot.classifier.folder import ABOUT_FILE
from tir_kernels.fewshot.command import main


@pytest.mark.slow
def test_white_is_what_it_was_when_the_classifier_was_made(classifier, drawn, tmp_path):
    deep, own = tmp_path / "deep.png", shutil.copytree(classifier, tmp_path / "own")
    grey = np.asarray(Image.open(next(drawn.rglob("*.png"))).convert("L"), dtype=np.uint16)
    Image.fromarray(grey * 16).save(deep)
    about = own / ABOUT_FILE
    about.write_text(json.dumps({**json.loads(about.read_text()), "white_value": 4095}))
    rows = {}
    for name, folder, options in (
        ("unset", classifier, []),
        ("given", classifier, ["--white-value=4095"]),
        ("kept", own, []),
        ("told otherwise", own, ["--white-value=65535"]),
    ):
        out = tmp_path / f"{name}.csv"
        command = ["predict", str(folder), str(deep), "--out", str(out), "--device=cpu", *options]
        assert main([*command, "--probabilities"]) == 0
        rows[name] = out.read_text()
    assert rows["kept"] == rows["given"] != rows["unset"] == rows["told otherwise"]
