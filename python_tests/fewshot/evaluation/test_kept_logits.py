"""An evaluation that was stopped goes on, and keeps out of others' folders."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from evaluations import Settings, assert_same_numbers, counting, evaluate

from tir_kernels import fewshot
from tir_kernels.demo import model_directory
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.evaluation.evaluating import Evaluator
from tir_kernels.fewshot.evaluation.kept import LOGITS_NAME, KeptLogits


def test_what_is_kept_is_not_computed_again(drawn, tmp_path):
    whole, _ = evaluate(drawn)
    evaluator, done = counting(drawn, Settings(bootstrap=20, batch_size=5))
    first = evaluator.evaluate(str(drawn.test), out=str(tmp_path / "out"))
    assert done == [0, 5, 10, 15, 20, 24]
    assert_same_numbers(whole, first)
    path = tmp_path / "out" / LOGITS_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:9]) + lines[9][:30])  # as a kill leaves it
    evaluator, done = counting(drawn)
    assert_same_numbers(whole, evaluator.evaluate(str(drawn.test), out=str(tmp_path / "out")))
    assert done == [8, 24]
    assert len(path.read_bytes().splitlines()) == 25


def test_a_changed_image_is_classified_again(drawn, test_copy, tmp_path):
    evaluate(drawn, test_copy, out=str(tmp_path / "out"))
    one, other = sorted(test_copy.rglob("*.png"))[:24:23]
    shutil.copy(other, one)
    evaluator, done = counting(drawn)
    found = evaluator.evaluate(str(test_copy), out=str(tmp_path / "out"))
    assert done == [23, 24]
    assert_same_numbers(found, evaluate(drawn, test_copy)[0])


def test_another_evaluation_s_folder_is_refused(drawn, test_copy, tmp_path):
    out = str(tmp_path / "out")
    evaluate(drawn, out=out)
    with pytest.raises(FewShotError, match=r"another evaluation: data was .*test, is .*copy"):
        evaluate(drawn, test_copy, out=out)
    with pytest.raises(FewShotError, match=r"white_value was unset, is 200"):
        evaluate(drawn, settings=Settings(white_value=200.0), out=out)
    other = fewshot.fit(
        drawn.support,
        str(model_directory()),
        method=fewshot.methods.ZeroShot(),
        settings=fewshot.FitSettings(folds=0),
    )
    with pytest.raises(FewShotError, match=r"the classifier was \w+, is \w+"):
        Evaluator(other).evaluate(str(drawn.test), out=out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(FewShotError, match=r"holds other things \(thesis.txt\)"):
        evaluate(drawn, out=str(tmp_path / "mine"))
    lines = (tmp_path / "out" / LOGITS_NAME).read_bytes().splitlines(keepends=True)
    for place, part in ((0, "is not of an evaluation"), (3, "line 4 of .* is damaged")):
        broken = [*lines[:place], lines[place][:-9] + b"\n", *lines[place + 1 :]]
        (tmp_path / "out" / LOGITS_NAME).write_bytes(b"".join(broken))
        with pytest.raises(FewShotError, match=part):
            evaluate(drawn, out=out)


def test_two_at_once_in_one_folder_are_refused(drawn, tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with KeptLogits(tmp_path / "out", {}, 4):
            os.write(writer, b"x")
            time.sleep(600)
        os._exit(0)
    try:
        assert os.read(reader, 1) == b"x"
        with pytest.raises(FewShotError, match="out: another process is running in"):
            evaluate(drawn, out=str(tmp_path / "out"))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_killed_and_continued_it_finds_the_same(drawn, tmp_path):
    out = tmp_path / "out"
    arguments = ["evaluate", str(drawn.folder), "--data", str(drawn.test), "--device", "cpu"]
    command = [sys.executable, "-c", SLOW, *arguments, "--out", str(out), "--batch-size", "2"]
    for kills in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while lines(out) < 4 * (kills + 1):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert 1 < lines(out) < 25
    assert not (out / "evaluation.json").exists()
    evaluator, done = counting(drawn, Settings())
    found = evaluator.evaluate(str(drawn.test), out=str(out))
    assert done[0] >= 7
    whole, _ = evaluate(drawn, settings=Settings())
    assert_same_numbers(found, whole)


def lines(out):
    path = out / LOGITS_NAME
    return path.read_bytes().count(b"\n") if path.exists() else 0


# The command line with a pause after each batch, so that there is time to kill it.
SLOW = """
import sys, time
from tir_kernels.fewshot.classifier.classifier import Scorer
from tir_kernels.fewshot.command import main
plain = Scorer.logits
def slowly(self, images):
    time.sleep(0.3)
    return plain(self, images)
Scorer.logits = slowly
sys.exit(main(sys.argv[1:]))
"""
