"""The temperature of least log loss is found, or it is said why there is none."""

import json

import numpy as np
import pytest
from scipy.special import softmax

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.evaluation.temperature import fit_temperature, keep_temperature


@pytest.mark.parametrize("factor", [0.2, 1.0, 6.0])
def test_it_is_the_factor_that_logits_are_too_large_by(factor):
    random = np.random.default_rng(0)
    true = 2 * random.normal(size=(20_000, 4))
    labels = (softmax(true, axis=1).cumsum(1) < random.random((20_000, 1))).sum(1)
    found = fit_temperature((factor * true).astype(np.float32), labels)
    assert found == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize(("labels", "right"), [([0, 1, 2], 3), ([1, 2, 0], 0)])
def test_answers_that_are_all_right_or_all_wrong_have_none(labels, right):
    with pytest.raises(FewShotError, match=rf"temperature: .* {right} of 3 held-out images"):
        fit_temperature(5 * np.eye(3, dtype=np.float32), np.array(labels))


def test_it_is_kept_beside_everything_else(tmp_path):
    content = {"format": 1, "temperature": 1.0, "files": {"a": "b"}, "more": [1, "ü"]}
    (tmp_path / "classifier.json").write_text(json.dumps(content))
    keep_temperature(tmp_path, 2.25)
    assert json.loads((tmp_path / "classifier.json").read_text()) == {
        **content,
        "temperature": 2.25,
    }
    with pytest.raises(FewShotError, match="can't read"):
        keep_temperature(tmp_path / "none", 2.0)
