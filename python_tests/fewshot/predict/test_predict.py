"""``tir-finetune predict`` by its command line: what is written, skipped, continued and refused."""

import csv
import errno
import io
import os
import re
import shutil
import sys
import tarfile

import pytest
import torch
from command_line import assert_refused

from tir_kernels import fewshot
from tir_kernels.fewshot.classifier.folder import ABOUT_FILE
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.predict import rows as rows_module
from tir_kernels.fewshot.predict.output import Files
from tir_kernels.fewshot.run.lock import RunLock
from tir_kernels.fewshot.run.workers import Place


@pytest.fixture
def predict(classifier):
    """Runs the command on the classifier."""

    def run(*arguments, device="cpu"):
        words = [str(each) for each in arguments]
        return main(["predict", str(classifier), *words, f"--device={device}"])

    return run


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_classifiers_own_predictions(predict, classifier, drawn, tmp_path):
    out = tmp_path / "p.csv"
    assert predict(drawn, "--out", out, "--top=3", "--probabilities", "--batch-size=4") == 0
    paths = sorted(str(path) for path in drawn.rglob("*.png"))
    loaded = fewshot.load_classifier(classifier)
    expected = loaded.predict(paths)
    found = table(out)
    assert [row["image"] for row in found] == paths
    assert list(found[0])[:5] == ["image", "label", "probability", "label_2", "probability_2"]
    own = [[float(row[f"probability:{label}"]) for label in loaded.labels] for row in found]
    torch.testing.assert_close(torch.tensor(own), expected, atol=2e-6, rtol=1e-4)
    for row, values in zip(found, expected, strict=True):
        order = [loaded.labels[at] for at in values.argsort(descending=True)]
        assert [row["label"], row["label_2"], row["label_3"]] == order
        assert float(row["probability"]) == pytest.approx(values.max().item(), abs=2e-6)


def test_without_a_file_rows_are_printed(predict, drawn, capsys):
    assert predict(drawn, "--batch-size=7") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "image,label,probability"
    assert len(lines) == 16
    assert re.search(r"15 images classified, [\d.]+ images/s", captured.err)


@pytest.mark.slow
def test_a_folder_a_shard_and_a_list_give_the_same(predict, drawn, tmp_path, capsys):
    assert predict(drawn, "--out", tmp_path / "folder.csv") == 0
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(drawn, ".")
    assert predict(tmp_path / "s.tar", "--out", tmp_path / "shard.csv") == 0
    listed = [row["image"] for row in table(tmp_path / "folder.csv")]
    (tmp_path / "l.txt").write_text("\n".join(listed))
    assert predict(tmp_path / "l.txt", "--out", tmp_path / "list.csv") == 0
    assert (tmp_path / "list.csv").read_bytes() == (tmp_path / "folder.csv").read_bytes()
    inside = {row["image"].split("/./")[1]: row for row in table(tmp_path / "shard.csv")}
    for row in table(tmp_path / "folder.csv"):
        other = inside[os.path.relpath(row["image"], drawn)]
        assert other["label"] == row["label"]
        assert float(other["probability"]) == pytest.approx(float(row["probability"]), abs=1e-5)
    assert predict(tmp_path / "folder.csv", "--out", tmp_path / "again.csv") == 0
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "folder.csv").read_bytes()


def test_parquet_holds_the_same(predict, drawn, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    options = ["--top=2", "--probabilities"]
    assert predict(drawn, "--out", tmp_path / "p.csv", *options) == 0
    assert predict(drawn, "--out", tmp_path / "p.parquet", *options) == 0
    found = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    for row, other in zip(found, table(tmp_path / "p.csv"), strict=True):
        assert row.keys() == other.keys()
        assert row["image"] == other["image"]
        assert row["probability_2"] == pytest.approx(float(other["probability_2"]), rel=1e-5)
    assert not list(tmp_path.glob(".p.parquet.csv"))


def test_without_pyarrow_parquet_is_refused(predict, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    arguments = ["predict", "x", str(drawn), "--out", str(tmp_path / "p.parquet")]
    assert_refused(capsys, arguments, "--out", "tir_kernels[parquet]", ".csv")


def test_what_cannot_be_read_is_skipped_and_listed(predict, images, tmp_path, capsys):
    folder = sorted(images.iterdir())[0]
    (folder / "000.png").write_bytes(b"no image")
    for number in range(12):
        (folder / f"x{number}.jpg").write_bytes(b"")
    listed = tmp_path / "l.txt"
    listed.write_text(f"{images}/gone.jpg\n=cmd.jpg\n")
    assert predict(images, listed, "--out", tmp_path / "p.csv") == 0
    error = capsys.readouterr().err
    assert "15 images can't be read and are listed in" in error
    assert "; and 5 more" in error
    assert len(table(tmp_path / "p.csv")) == 14
    skipped = table(tmp_path / "p.unreadable.csv")
    assert len(skipped) == 15
    reasons = {row["image"]: row["reason"] for row in skipped}
    assert reasons[f"{images}/gone.jpg"] == "No such file or directory"
    assert "'=cmd.jpg" in reasons
    assert all(reasons.values())
    # Repaired, it gets its row; the others are tried again.
    shutil.copy(folder / "001.png", folder / "000.png")
    assert predict(images, listed, "--out", tmp_path / "p.csv") == 0
    assert len(table(tmp_path / "p.csv")) == 15
    assert len(table(tmp_path / "p.unreadable.csv")) == 14


def test_no_image_at_all_is_an_error(predict, classifier, tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert predict(tmp_path / "a.jpg", "--out", tmp_path / "p.csv") == 2
    assert "none can be read" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "s.tar").write_bytes(b"")
    assert predict(tmp_path / "empty") == 2
    assert "no images in them; left out: 1 file ending in .tar" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_goes_on_where_it_was_stopped(predict, drawn, tmp_path, monkeypatch):
    out, reference = tmp_path / "p.csv", tmp_path / "reference.csv"
    assert predict(drawn, "--out", reference, "--batch-size=1") == 0
    expected = reference.read_bytes()
    ends = [at for at, byte in enumerate(expected) if byte == ord("\n")]
    shutil.copy(tmp_path / ".reference.csv.json", tmp_path / ".p.csv.json")
    for cut in (0, ends[0] - 3, ends[0] + 1, ends[6] + 9, ends[15]):
        out.write_bytes(expected[:cut])
        written = []
        write = Files.write

        def counted(self, rows, write=write, written=written):
            written.extend(rows)
            write(self, rows)

        with monkeypatch.context() as patched:
            patched.setattr(Files, "write", counted)
            assert predict(drawn, "--out", out, "--batch-size=1") == 0
        assert out.read_bytes() == expected
        assert len(written) == 15 - max(0, sum(end < cut for end in ends) - 1)


@pytest.mark.slow
def test_images_that_came_later_follow_and_those_that_went_stay(predict, images, tmp_path):
    out = tmp_path / "p.csv"
    assert predict(images, "--out", out) == 0
    before = table(out)
    first, *_ = sorted(images.rglob("*.png"))
    first.rename(images / "0-new.png")
    assert predict(images, "--out", out) == 0
    assert table(out)[:15] == before
    assert [row["image"] for row in table(out)[15:]] == [str(images / "0-new.png")]


def test_a_full_disk_loses_no_row(predict, drawn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.csv"
    write = os.write
    left = [700]

    def filling(descriptor, content):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(descriptor, bytes(content[: left[0]]))
        left[0] -= count
        return count

    with monkeypatch.context() as patched:
        patched.setattr(rows_module.os, "write", filling)
        assert predict(drawn, "--out", out, "--batch-size=2") == 2
    assert "No space left" in capsys.readouterr().err
    kept = table(out)
    assert 0 < len(kept) < 15
    assert predict(drawn, "--out", out, "--batch-size=2") == 0
    assert table(out)[: len(kept)] == kept
    assert len(table(out)) == 15


@pytest.mark.slow
def test_parquet_goes_on_too(predict, images, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    out, work = tmp_path / "p.parquet", tmp_path / ".p.parquet.csv"
    write = Files.write

    def stop(self, rows):
        write(self, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Files, "write", stop)
        assert predict(images, "--out", out, "--batch-size=4") == 130
    assert not out.exists()
    assert len(work.read_bytes().splitlines()) == 5
    work.write_bytes(work.read_bytes() + b"half a ro")
    assert predict(images, "--out", out) == 0
    names = parquet.read_table(out)["image"].to_pylist()
    assert sorted(names) == sorted(map(str, images.rglob("*.png")))
    # More images are added to what is there; and what a killed process left behind is not.
    shutil.copy(names[0], images / "new.png")
    unlink = type(work).unlink

    def killed(path, missing_ok=False):
        if path == work:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(type(work), "unlink", killed)
        assert predict(images, "--out", out) == 130
    assert work.exists()
    assert predict(images, "--out", out) == 0
    assert parquet.read_table(out)["image"].to_pylist() == [*names, str(images / "new.png")]
    assert not work.exists()


@pytest.mark.slow
def test_changed_settings_are_refused(predict, classifier, drawn, tmp_path, capsys):
    out = tmp_path / "p.csv"
    assert predict(drawn, "--out", out) == 0
    capsys.readouterr()
    for options, words in (
        (["--top=2"], "--top was 1, is 2"),
        (["--probabilities"], "--probabilities was False, is True"),
        (["--precision=bfloat16"], "--precision was float32, is bfloat16"),
        (["--white-value=300"], "--white-value was unset, is 300"),
    ):
        assert predict(drawn, "--out", out, *options) == 2
        assert words in capsys.readouterr().err
    other = shutil.copytree(classifier, tmp_path / "other")
    about = other / ABOUT_FILE
    about.write_text(about.read_text().replace('"temperature": 1.0', '"temperature": 2.0'))
    assert main(["predict", str(other), str(drawn), "--out", str(out), "--device=cpu"]) == 2
    assert "classifier was content" in capsys.readouterr().err
    assert predict(drawn, "--out", out, "--batch-size=3") == 0


@pytest.mark.slow
def test_two_into_one_file_are_refused(predict, drawn, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p.csv"
    pid = os.fork()  # locks tell processes apart, and nothing within one
    if pid == 0:
        try:
            RunLock(tmp_path / ".p.csv.lock", Place("process 1 on other"))
            (tmp_path / "held").touch()
            while not (tmp_path / "done").exists():
                pass
        finally:
            os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            pass
        assert predict(drawn, "--out", out) == 2
        assert "another process is running" in capsys.readouterr().err
        assert not out.exists()
    finally:
        (tmp_path / "done").touch()
        os.waitpid(pid, 0)
    assert predict(drawn, "--out", out) == 0


def test_files_of_others_are_not_touched(predict, drawn, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("my,results\n")
    assert predict(drawn, "--out", tmp_path / "mine.csv") == 2
    assert "not written by predict" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "my,results\n"
    (tmp_path / "link.csv").symlink_to("mine.csv")
    assert predict(drawn, "--out", tmp_path / "link.csv") == 2
    assert "not a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "p.txt"], "must end in .csv or .parquet"),
        (["--pretrained=x"], "--pretrained needs --model"),
        (["--report"], "--report needs --out"),
        (["--backend=magic"], "--backend"),
        (["--white-value=0"], "--white-value"),
        (["--batch-size=0"], "--batch-size"),
        (["--top=0"], "--top"),
    ],
)
def test_options_that_make_no_sense_are_refused(classifier, drawn, options, words, capsys):
    assert main(["predict", str(classifier), str(drawn), *options]) == 2
    assert words in capsys.readouterr().err


def test_more_classes_than_there_are(predict, drawn, capsys):
    assert predict(drawn, "--top=4") == 2
    assert "--top must be at most 3" in capsys.readouterr().err


def test_nobody_reads_on(predict, drawn, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            if self.getvalue():
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Closed())
    assert predict(drawn) == 2
    assert "standard output can't be written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_page_shows_the_surest_and_the_least_sure(predict, drawn, tmp_path, capsys):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(drawn, "=in")
    out, page = tmp_path / "p.csv", tmp_path / "p.html"
    arguments = [drawn, tmp_path / "s.tar", "--out", out]
    assert predict(*arguments) == 0
    assert predict(*arguments, "--report") == 0
    assert "30 more were classified before" in capsys.readouterr().err
    text = page.read_text()
    assert "30 images classified" in text
    assert text.count("classes that pick it, of 3") == 16
    assert text.count("data:image/jpeg") == 16
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    found = sorted(table(out), key=lambda row: -float(row["probability"]))
    for row in (*found[:7], *found[-7:]):
        assert row["image"] in text
    page.write_text("mine")
    assert predict(*arguments, "--report") == 2
    assert page.read_text() == "mine"


def test_images_are_asked_for_no_faster_than_they_are_classified(classifier, drawn):
    from itertools import count

    from tir_kernels.fewshot.data.decoding import Decoding
    from tir_kernels.fewshot.predict.items import Image
    from tir_kernels.fewshot.predict.loop import Predictor
    from tir_kernels.fewshot.predict.rows import Columns

    loaded = fewshot.load_classifier(classifier)
    path = next(drawn.rglob("*.png"))
    asked = 0

    def endless():
        nonlocal asked
        for number in count():
            asked += 1
            yield Image(str(number), path)

    predictor = Predictor(loaded, Columns(loaded.labels), Decoding(), batch_size=4, threads=2)
    images = predictor.decoded(endless())
    for number in range(40):
        assert next(images).name == str(number)
        assert asked <= number + 3 * 4
    images.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{drawn}"], "--out is needed where several processes share the work"),
        (["-", "--out=p.csv"], "- can't be shared by several processes"),
        (["{drawn}", "--out=p.csv", "--report"], "--report is for one process"),
    ],
)
def test_what_several_processes_cannot_share(predict, drawn, monkeypatch, capsys, arguments, words):
    values = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 1}
    values |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    assert predict(*(each.format(drawn=drawn) for each in arguments)) == 2
    assert words in capsys.readouterr().err
