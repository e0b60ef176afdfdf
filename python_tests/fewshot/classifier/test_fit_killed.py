"""A fit goes on from whatever a kill leaves on the disk, and its page is the classifier's."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from classifier.test_fit_command import SIZES, SMALL, assert_same
from small_images import write_images

from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.appended import AppendedLines

TRACK = "--track=every=2,measures=sink-ratio"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model_folder):
    data = write_images(tmp_path_factory.mktemp("data") / "images", SIZES)
    return ["fit", "--data", str(data), "--model", str(tiny_model_folder), *SMALL.split(), TRACK]


@pytest.fixture(scope="module")
def moments(arguments, tmp_path_factory):
    """The folder of a finished fit, and copies of it from before each change of a file in it."""
    place = tmp_path_factory.mktemp("moments")
    out, numbers, copies = place / "mine", itertools.count(), []

    def noting(change):
        def changed(*positional, **options):
            if out.exists():
                copies.append(place / str(next(numbers)) / "mine")
                shutil.copytree(out, copies[-1])
            return change(*positional, **options)

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", noting(os.replace))
        patch.setattr(Path, "unlink", noting(Path.unlink))
        patch.setattr(AppendedLines, "append", noting(AppendedLines.append))
        assert main([*arguments, "--out", str(out)]) == 0
    return out, copies


@pytest.mark.slow
def test_killed_at_any_change_of_a_file(arguments, moments, capsys):
    out, copies = moments
    finished = [(copy / "classifier.json").exists() for copy in copies]
    assert not finished[0]
    assert finished[-1]
    assert any(list(copy.glob(".*.partial")) for copy in copies)
    names = sorted(path.relative_to(out) for path in out.rglob("*"))
    for copy in copies:
        assert main([*arguments, "--out", str(copy)]) == 0, capsys.readouterr().err
        assert "damaged" not in capsys.readouterr().err
        assert_same(copy, out)
        left = sorted(path.relative_to(copy) for path in copy.rglob("*"))
        assert [path for path in left if ".partial" not in path.name] == names


@pytest.mark.slow
def test_the_page_is_called_like_the_classifier(moments):
    out, _ = moments
    assert "<title>mine</title>" in (out / "report.html").read_text()


@pytest.mark.slow
def test_made_anew_beside_its_page(arguments, moments, tmp_path, capsys):
    """As a kill leaves it while a damaged classifier is written again."""
    out = tmp_path / "mine"
    shutil.copytree(moments[0], out)
    (out / "classifier.json").unlink()
    (out / "report.html").unlink()
    (out / ".learned.safetensors.1.partial").write_bytes(b"a beginning")
    assert main([*arguments, "--out", str(out)]) == 0
    assert_same(out, moments[0])
    assert (out / "report.html").exists()
    assert not (out / ".learned.safetensors.1.partial").exists()
    (out / "report.html").unlink()
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 0
    assert "is finished, with these settings" in capsys.readouterr().out
    assert (out / "report.html").exists()
