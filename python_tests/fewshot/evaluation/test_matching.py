"""Classes of the data are matched with the classifier's by their names."""

import numpy as np
import pytest
from PIL import Image

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.evaluation.matching import match_classes, renamed_notes
from tir_kernels.fewshot.methods import ZeroShot

LABELS = ("AnnualCrop", "River", "sea lake")


@pytest.fixture
def about():
    base = BaseModel("model", None, "a model", "0" * 64)
    words = ("annual crop", "river", "sea or lake")
    return About(LABELS, words, ZeroShot(), base, 0, 1, 1, "float32", (1, 1, 1))


@pytest.fixture
def listed(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).mkdir()
            Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / name / "a.png")
        return load_data(tmp_path, needs_words=False)

    return make


def test_order_does_not_matter_and_missing_ones_are_named(about, listed):
    found = match_classes(about, listed("sea lake", "AnnualCrop"))
    assert {at: entry.folder for at, entry in found.classes.items()} == {
        0: "AnnualCrop",
        2: "sea lake",
    }
    assert found.missing == ("River",)
    assert found.left_out == ()


def test_unknown_classes_are_refused_or_left_out(about, listed):
    data = listed("River", "Forest", "Road")
    with pytest.raises(FewShotError, match=r"2 classes 'Forest', 'Road' .*leave_out_unknown"):
        match_classes(about, data)
    found = match_classes(about, data, leave_out_unknown=True)
    assert [entry.folder for entry in found.left_out] == ["Forest", "Road"]
    assert list(found.classes) == [1]
    assert renamed_notes(about, found) == ""


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("annualcrop", "AnnualCrop"),
        ("annual_crop", "AnnualCrop"),
        ("RIVER", "River"),
        ("sea or lake", "sea lake"),
        ("Sea-Lake", "sea lake"),
    ],
)
def test_renamed_classes_are_told_what_to_do(about, listed, name, label):
    others = [each for each in LABELS if each != label]
    data = listed(name, *others)
    with pytest.raises(FewShotError, match=f"rename them in the data: '{name}' is '{label}'"):
        match_classes(about, data)
    left_out = match_classes(about, data, leave_out_unknown=True)
    assert f"'{name}' is '{label}'" in renamed_notes(about, left_out)


def test_a_name_that_the_data_has_anyway_is_no_hint(about, listed):
    with pytest.raises(FewShotError, match="leave_out_unknown") as caught:
        match_classes(about, listed("River", "river"))
    assert "rename them in the data" not in str(caught.value)


def test_data_of_other_classes_is_refused_whatever_is_left_out(about, listed):
    data = listed("cat", "dog")
    for leave_out in (False, True):
        with pytest.raises(FewShotError, match=r"knows no class of .*'cat', 'dog'"):
            match_classes(about, data, leave_out_unknown=leave_out)
