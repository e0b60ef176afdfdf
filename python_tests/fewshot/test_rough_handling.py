"""The command line under odd arguments, machines and signals: one sentence, never a traceback."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_engine
import pytest
import torch
from command_line import SMALL, assert_refused, results, with_value
from small_images import write_images

from tir_kernels.fewshot import devices
from tir_kernels.fewshot.command import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(make_images, tmp_path):
    out = str(tmp_path / "out")
    return ["run", "--data", str(make_images()), "--model", "fake", "--out", out, *SMALL.split()]


def failing(monkeypatch, error):
    """Let each training end with an error."""

    def finetune(*positional, **options):
        raise error

    monkeypatch.setattr(fake_engine, "fake_finetune", finetune)


def test_the_device_is_chosen_and_told(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    automatic = [word for word in arguments if word != "--device=cpu"]
    assert fake_engine.run_main(automatic) == 0
    assert "--device auto: cpu, since PyTorch sees no CUDA GPU" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert settings["device"] == "cpu"
    # What was chosen is what counts when the run is continued.
    assert fake_engine.run_main(arguments) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    assert devices.resolve_device("auto") == ("cuda", "device=auto: cuda (H100)")
    assert devices.resolve_device("cuda:1") == ("cuda:1", "")


def test_help_lists_the_choices(capsys):
    assert main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--rule [linear|extremes|suppress|amplify|suppress-linear|amplify-linear|none]" in text
    assert "--backend [auto|reference|cpu|triton|cuda]" in text
    assert "--device TEXT" in text
    assert "[default: auto]" in text


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--augment", "so many views of one image"),
        ("--context-tokens", "no text tower has as many positions"),
        ("--episodes", "the interval of a mean"),
        ("--parallel-episodes", "no device's memory"),
        ("--lora-rank", "no layer is as wide"),
        ("--steps", "no few-shot training"),
        ("--shots", "no class has as many images"),
        ("--ways", "more than the 6 classes"),
        ("--queries", "are needed"),
    ],
)
def test_counts_without_bounds_are_refused(arguments, capsys, option, reason):
    assert_refused(capsys, with_value(arguments, option, "1000000000"), option, reason)


def test_a_seed_has_a_bound(arguments, capsys):
    assert_refused(capsys, with_value(arguments, "--seed", str(2**63)), "--seed must be at most ")


@pytest.mark.parametrize("option", ["--data", "--model", "--out", "--cache", "--class-names"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [("", "is a shell variable not set?"), ("a\0b", "NUL byte"), ("x" * 5000, "is too long")],
)
def test_names_that_no_file_can_have(arguments, capsys, option, value, reason):
    assert_refused(capsys, with_value(arguments, option, value), option, reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend runs on this machine's GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_cannot_run_here(arguments, capsys, monkeypatch, backend):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong = [*arguments, "--backend", backend]
    assert_refused(capsys, wrong, f"--backend '{backend}' cannot run here: ")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 99 bytes"),
        MemoryError("Unable to allocate 9 TiB for an array"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=["torch", "numpy", "system", "cuda"],
)  # fmt: skip
def test_memory_runs_out(arguments, capsys, monkeypatch, error):
    failing(monkeypatch, error)
    parts = ["episode 0, tir: out of memory on cpu", "--checkpoint"]
    assert_refused(capsys, arguments, *parts, program=fake_engine.run_main)


def test_what_nobody_foresaw_is_written_to_a_file(arguments, tmp_path, capsys, monkeypatch):
    failing(monkeypatch, KeyError("an odd key"))
    assert fake_engine.run_main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tir-finetune: error: an error that was not foreseen (KeyError: 'an odd")
    (path,) = (tmp_path / "out").glob("error-*.txt")
    assert str(path) in line
    text = path.read_text()
    assert "Traceback (most recent call last)" in text
    assert "KeyError: 'an odd key'" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text
    # The run can go on.
    monkeypatch.undo()
    assert fake_engine.run_main(arguments) == 0


def test_words_that_the_tokenizer_does_not_tell_apart(arguments, tmp_path, capsys):
    words = {f"Class{letter}": f"kind {letter}" for letter in "ABCDEF"}
    words["ClassB"] = "else a"
    (tmp_path / "names.json").write_text(json.dumps(words))

    def tokenizer(texts):
        return torch.tensor([[len(text), ord(text[-1].lower())] for text in texts])

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(fake_engine, "fake_tokenizer", tokenizer)
    try:
        assert_refused(
            capsys,
            [*arguments, "--class-names", str(tmp_path / "names.json")],
            "'ClassA' and 'ClassB'",
            "tokenizer does not tell apart",
            program=fake_engine.run_main,
        )
    finally:
        monkeypatch.undo()


def test_float16_trains_one_episode_at_a_time(arguments, capsys, tiny_model_folder):
    wrong = [*with_value(arguments, "--model", str(tiny_model_folder)), "--layers=0"]
    wrong += ["--precision", "float16", "--parallel-episodes", "2", "--steps", "1"]
    assert_refused(capsys, wrong, "--parallel-episodes", "float16", "bfloat16")


def test_a_finished_run_is_shown_from_a_folder_that_is_read_only(
    arguments, tmp_path, capsys, monkeypatch
):
    assert fake_engine.run_main(arguments) == 0
    table = capsys.readouterr().out.removesuffix(f"{fake_engine.no_page([], '')}\n")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    # Root may write anywhere but on a medium that is read-only, which is what is played here.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)

    def refuse(*positional, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("ftruncate", "pwrite", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    assert fake_engine.run_main(arguments) == 0
    assert capsys.readouterr().out == table
    more = with_value(arguments, "--episodes", "4")
    parts = ["can't write in ", "2 results of the run are not there yet"]
    assert_refused(capsys, more, *parts, program=fake_engine.run_main)
    other = with_value(arguments, "--seed", "4")
    assert_refused(capsys, other, "--seed was 0, is 4", program=fake_engine.run_main)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["summary.json", "settings.json", ".lock"])
@pytest.mark.parametrize("content", ['{"accuracy": 3}', "not even JSON", "[1, 2]"])
def test_files_of_others_are_left_alone(arguments, tmp_path, capsys, name, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    assert_refused(capsys, arguments, str(tmp_path / "out" / name), "choose another folder")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == content


@pytest.mark.parametrize("name", ["summary.json", "settings.json", ".lock", "episodes.jsonl"])
def test_links_in_a_run_folder_are_not_followed(arguments, tmp_path, capsys, name):
    precious = tmp_path / "precious"
    precious.write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(precious)
    assert_refused(capsys, arguments, name, "a link", "choose another folder")
    assert precious.read_text() == ""


def test_other_files_in_a_run_folder_are_no_matter(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert fake_engine.run_main(arguments) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_journal_that_is_removed_ends_the_run(arguments, tmp_path, capsys, monkeypatch):
    journal, finetune = tmp_path / "out" / "episodes.jsonl", fake_engine.fake_finetune
    calls = []

    def removing(*positional, **options):
        calls.append(None)
        if len(calls) == 3:
            journal.rename(tmp_path / "moved")
        return finetune(*positional, **options)

    monkeypatch.setattr(fake_engine, "fake_finetune", removing)
    assert fake_engine.run_main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{journal} was removed by another program while the run was on" in last
    assert len(calls) == 3
    # What it had written is whole, and the same command runs the rest.
    journal.unlink(missing_ok=True)
    (tmp_path / "moved").rename(journal)
    assert len(results(tmp_path / "out")) == 2
    assert fake_engine.run_main(arguments) == 0
    assert len(results(tmp_path / "out")) == 6


def test_a_class_folder_whose_name_is_not_utf_8(tmp_path, arguments, capsys):
    images = Path(arguments[2])
    name = os.fsdecode(b"for\xeat")
    try:
        (images / "ClassA").rename(images / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    words = {entry.name: f"kind {number}" for number, entry in enumerate(images.iterdir())}
    (tmp_path / "names.json").write_text(json.dumps(words))
    whole = [*arguments, "--class-names", str(tmp_path / "names.json"), "--ways", "6"]
    assert fake_engine.run_main(whole) == 0
    assert all(r"for\xeat" in record.classes for record in results(tmp_path / "out"))
    assert fake_engine.run_main(whole) == 0
    capsys.readouterr()


def test_control_characters_of_a_journal_are_not_printed(arguments, tmp_path, capsys):
    assert fake_engine.run_main(arguments) == 0
    capsys.readouterr()
    path = tmp_path / "out" / "episodes.jsonl"
    first, *rest = path.read_text().splitlines()
    values = json.loads(first) | {"correct": None, "accuracy": None, "status": "\x1b[2J[red]:x:"}
    values["skipped"] = ["a\x07[bold]b"]
    path.write_text("\n".join([json.dumps(values), *rest]) + "\n")
    assert fake_engine.run_main(arguments) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\x07" not in captured.out
    assert "a\\x07[bold]b" in captured.out
    assert "\\x1b[2J[red]:x:" in captured.err


class FullDisk(io.StringIO):
    """An output on a disk without room."""

    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", [FullDisk, None])
def test_an_output_that_cannot_be_written(arguments, tmp_path, capsys, monkeypatch, name, kind):
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, kind() if kind else None)
        status = fake_engine.run_main(arguments)
    captured = capsys.readouterr()
    assert len(results(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "summary.json").exists()
    if name == "stdout":
        assert status == 2
        assert "standard output can't be written: " in captured.err.splitlines()[-1]
    else:
        assert status == 0
        assert "Accuracy" in captured.out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_that_lacks_a_character(make_images, tmp_path, monkeypatch, encoding):
    images = write_images(tmp_path / "images", {f"森{letter}": 8 for letter in "abc"})
    out = tmp_path / "ou↦t"
    arguments = ["run", "--data", str(images), "--model", "fake", "--out", str(out), *SMALL.split()]
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        assert fake_engine.run_main([*arguments, "--method", "tir", "--method", "lora"]) == 0
        failing(patch, ValueError("森"))
        assert fake_engine.run_main([*arguments, "--episodes", "9"]) == 2
    table, messages = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert "Accuracy" in table
    assert "tir" in table
    assert "\\u68ee" in messages
    assert len(results(out)) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seconds", "number"),
    [(0.3, signal.SIGINT), (0.8, signal.SIGINT), (1.5, signal.SIGINT), (0.5, signal.SIGTERM)],
)
def test_interrupted_in_the_first_seconds(tmp_path, seconds, number):
    write_images(tmp_path / "images", {"a": 8, "b": 8})
    arguments = ["run", "--data", "images", "--model", "ViT-B-32", "--pretrained=none.pt"]
    # What comes before is Python's own start.
    started = (
        "import sys, runpy, tir_kernels.fewshot.interrupts; "
        "sys.stdout.write('!'); sys.stdout.flush(); "
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{started} sys.argv = ['tir-finetune', *{arguments!r}, '--out', 'out']; "
            "runpy.run_module('tir_kernels.fewshot', run_name='__main__')",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Background jobs of a shell ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.read(1) == b"!"
    time.sleep(seconds)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert b"Traceback" not in error, error.decode()
    assert process.returncode in (130, -number, 2), error.decode()
