"""Evaluations of the drawn classifier, for all tests of them."""

import pytest

from tir_kernels import fewshot
from tir_kernels.fewshot.evaluation.evaluating import Evaluator

Settings = fewshot.EvaluateSettings
QUICK = Settings(bootstrap=20)


def evaluate(drawn, data=None, settings=QUICK, **more):
    """An evaluation, and the lines that were told."""
    told = []
    evaluator = Evaluator(drawn.classifier, settings, told.append)
    found = evaluator.evaluate(str(data or drawn.test), **more)
    return found, "\n".join(map(str, told))


def assert_same_numbers(one, two):
    """But for the last bits of logits, which the size of a batch decides."""
    assert one.confusion == two.confusion
    for name, score in one.scores.items():
        assert two.scores[name] == pytest.approx(score, rel=1e-5)
    assert one.calibration.error == pytest.approx(two.calibration.error, rel=1e-4)
    for each, other in zip(one.predictions, two.predictions, strict=True):
        assert each[:4] == other[:4]
        assert each[4:] == pytest.approx(other[4:], rel=1e-4)


def counting(drawn, settings=QUICK):
    """An evaluator, and the numbers of images that were done each time."""
    done = []
    return Evaluator(drawn.classifier, settings, None, lambda now, total: done.append(now)), done
