"""``tir-finetune fit``: classifiers from the command line, stopped and continued."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import assert_refused, with_value
from safetensors.torch import load_file
from small_images import write_images

from tir_kernels import fewshot
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier import fit_display, fit_folder, prepared_fit
from tir_kernels.fewshot.command import main
from tir_kernels.fewshot.run.tracked import read_tracked

ROOT = Path(__file__).parents[3]
SIZES = {"ClassA": 3, "ClassB": 4, "ClassC": 6}
SMALL = "--steps=4 --lora-lr=2e-3 --folds=2 --device=cpu --lora-rank=4 --no-cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", SIZES)


@pytest.fixture
def arguments(data, tmp_path, tiny_model_folder):
    options = ["fit", "--data", str(data), "--model", str(tiny_model_folder), *SMALL.split()]
    return [*options, "--out", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, tiny_model_folder):
    """The folder of a classifier whose fit was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = ["fit", "--data", str(data), "--model", str(tiny_model_folder), *SMALL.split()]
    assert main([*options, "--out", str(out)]) == 0
    return out


def learned(folder):
    """Everything that was learned, and what was found."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors, json.loads((Path(folder) / "classifier.json").read_text())["figures"]


def assert_same(folder, expected):
    (tensors, figures), (others, other_figures) = learned(folder), learned(expected)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(each, others[name]) for name, each in tensors.items())
    assert figures == other_figures


@pytest.fixture
def kept_often(monkeypatch):
    """The state is kept behind each step."""
    monkeypatch.setattr(fit_folder, "_SECONDS_BETWEEN_STATES", 0.0)


@contextlib.contextmanager
def stopped_at(fold, step, stop):
    """Call ``stop`` in the midst of a step; ``fold`` is ``None`` in the training on all images."""
    with pytest.MonkeyPatch.context() as patch:
        methods = fit_display.FitDisplay.step, fit_display.FitDisplay.step_of_all
        seen = []

        def note(current, number, *more):
            seen.append((current, number))
            if (current, number) == (fold, step):
                stop()

        def step_of_fold(self, current, number, loss):
            note(current, number)
            methods[0](self, current, number, loss)

        def step_of_all(self, number, loss):
            note(None, number)
            methods[1](self, number, loss)

        patch.setattr(fit_display.FitDisplay, "step", step_of_fold)
        patch.setattr(fit_display.FitDisplay, "step_of_all", step_of_all)
        yield seen


def interrupt():
    raise KeyboardInterrupt


def test_the_table_says_what_to_expect(data, tmp_path, tiny_model_folder, capsys):
    options = ["fit", "--data", str(data), "--model", str(tiny_model_folder), "--device=cpu"]
    options += ["--method=linear-probe", "--folds=3", "--out", str(tmp_path / "out")]
    assert main(options) == 0
    printed = capsys.readouterr()
    text = " ".join(printed.out.replace("│", " ").split())
    assert "labelled images 13 3 to 6 of a class" in text
    assert "classes 3" in text
    assert "optimistic" in text
    assert "95 % interval" in text
    assert "3-fold" in text
    assert "zero-shot on the same" in text
    assert f"Classifier: {tmp_path / 'out'}" in printed.out
    assert f"Next: tir-finetune predict {tmp_path / 'out'} IMAGES" in printed.out
    assert "1/4: fold 1 of 3 held out" in printed.err
    assert "4/4: trained on all 13 images" in printed.err
    classifier = fewshot.load_classifier(tmp_path / "out")
    assert classifier.labels == tuple(SIZES)
    assert classifier.about.support == tuple(SIZES.values())


def test_the_command_makes_what_the_call_makes(whole, data, tiny_model_folder):
    made = fewshot.fit(
        data,
        str(tiny_model_folder),
        method=fewshot.methods.TIR(steps=4, lora_lr=2e-3, lora_rank=4),
        settings=fewshot.FitSettings(folds=2),
    )
    read = fewshot.load_classifier(whole)
    assert read.about == made.about
    assert all(torch.equal(each, made.learned[name]) for name, each in read.learned.items())
    assert not (whole / ".fit" / "state.pt").exists()


def test_a_finished_fit_is_left_alone(whole, data, tiny_model_folder, capsys):
    options = ["fit", "--data", str(data), "--model", str(tiny_model_folder), *SMALL.split()]
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    assert main([*options, "--out", str(whole)]) == 0
    printed = capsys.readouterr()
    assert f"{whole} is finished, with these settings." in printed.out
    assert "held-out estimate" in printed.out
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    other = [*options, "--out", str(whole), "--seed=3", "--batch-size=5", "--strength=0.25"]
    words = [
        "holds a fit with other settings",
        "--seed was 0, is 3",
        "--batch-size was unset, is 5",
    ]
    assert_refused(capsys, other, *words, "--strength was 0.5, is 0.25")


def test_the_template_of_a_known_set(arguments, tmp_path, capsys):
    own = [*arguments, "--template=known", "--context-tokens=5", "--folds=0", "--steps=1"]
    assert_refused(capsys, own, "--template known: no template is known for the classes of")
    images = write_images(tmp_path / "eurosat", {"Forest": 2, "River": 2})
    own = with_value(own, "--data", str(images))
    assert main(own) == 0
    about = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert "a centered satellite photo of {}." in json.dumps(about)
    assert fewshot.load_classifier(tmp_path / "out").about.method.template == (
        "a centered satellite photo of {}.",
    )
    with pytest.raises(FewShotError, match="no template is known for the classes of"):
        fewshot.fit(arguments[2], arguments[4], method=fewshot.methods.LoRA(template=("known",)))


def test_other_images_are_refused(arguments, tmp_path, data, capsys):
    options = [*arguments, "--method=zero-shot", "--folds=0"]
    options = [each for each in options if not each.startswith(("--steps", "--lora"))]
    assert main(options) == 0
    assert "No held-out estimate: none was asked for." in capsys.readouterr().out
    other = write_images(tmp_path / "other", SIZES, seed=1)
    assert_refused(capsys, with_value(options, "--data", str(other)), "--data was content ")


@pytest.mark.slow
@pytest.mark.usefixtures("kept_often")
@pytest.mark.parametrize(("fold", "step"), [(1, 2), (None, 2)])
def test_interrupted_is_as_never_interrupted(arguments, tmp_path, whole, capsys, fold, step):
    with stopped_at(fold, step, interrupt):
        assert main(arguments) == 130
    err = capsys.readouterr().err
    assert "what is finished is kept. To continue: tir-finetune fit --data " in err
    with pytest.raises(FewShotError, match="fit is not finished"):
        fewshot.load_classifier(tmp_path / "out")
    with stopped_at("never", 0, interrupt) as seen:
        assert main(arguments) == 0
    assert seen[0] == (fold, step), "it goes on at the step it was stopped in"
    assert_same(tmp_path / "out", whole)


PROGRAM = """
import os, signal, sys
sys.path[:0] = {paths!r}
from classifier.test_fit_command import stopped_at
from tir_kernels.fewshot.classifier import fit_folder
from tir_kernels.fewshot.command import main
fit_folder._SECONDS_BETWEEN_STATES = 0.0
with stopped_at({fold}, {step}, lambda: os.kill(os.getpid(), signal.SIGKILL)):
    main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_is_as_never_killed(arguments, tmp_path, whole):
    """In the midst of a fold, and then of the training on all images."""
    paths = [str(ROOT), str(ROOT / "python_tests"), str(ROOT / "python_tests" / "fewshot")]
    for fold, step in ((1, 2), (None, 2)):
        program = PROGRAM.format(paths=paths, fold=fold, step=step)
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert main(arguments) == 0
    assert_same(tmp_path / "out", whole)


def test_the_folder_of_another_process_is_refused(arguments, tmp_path, capsys):
    forking = multiprocessing.get_context("fork")
    entered, leave = forking.Event(), forking.Event()

    def hold():
        with fit_folder.FitFolder(tmp_path / "out"):
            entered.set()
            leave.wait(60)

    process = forking.Process(target=hold)
    process.start()
    try:
        assert entered.wait(60)
        assert_refused(capsys, arguments, "--out: another process is running in ")
    finally:
        leave.set()
        process.join()


@pytest.mark.usefixtures("kept_often")
def test_full_disk(arguments, tmp_path, whole, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"tir-finetune: error: can't write {tmp_path / 'out'}/.fit/state.pt: ")
    assert "what is finished is kept: make room and give the same command again" in last
    assert json.loads((tmp_path / "out" / ".fit" / "parts.json").read_text())["zero-shot"]
    assert main(arguments) == 0
    assert_same(tmp_path / "out", whole)


def test_what_is_kept_is_read_as_tensors_alone(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit_folder, "_SECONDS_BETWEEN_STATES", 0.0)
    with stopped_at(0, 2, interrupt):
        assert main(arguments) == 130
    state = tmp_path / "out" / ".fit" / "state.pt"
    torch.save({"part": "fold0", "seen": None, "state": Path("x")}, state)
    capsys.readouterr()
    assert main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{state} is damaged" in last
    assert "delete it" in last


def test_an_image_that_vanishes(arguments, tmp_path, capsys, monkeypatch):
    images = write_images(tmp_path / "some", SIZES)
    read = prepared_fit.read_support

    def read_later(*positional):
        (images / "ClassB" / "001.png").unlink()
        return read(*positional)

    monkeypatch.setattr(prepared_fit, "read_support", read_later)
    assert main(with_value(arguments, "--data", str(images))) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"can't read the image {images}/ClassB/001.png" in last


def test_memory_runs_out(arguments, capsys, monkeypatch):
    def fail(*positional, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(prepared_fit, "expected_accuracy", fail)
    assert_refused(capsys, arguments, "out of memory on cpu", "--batch-size", "--shots")


def test_what_nobody_foresaw_is_written_to_a_file(arguments, tmp_path, capsys, monkeypatch):
    def fail(*positional, **options):
        raise KeyError("an odd key")

    with monkeypatch.context() as patch:
        patch.setattr(prepared_fit, "expected_accuracy", fail)
        assert main(arguments) == 1
    (path,) = (tmp_path / "out" / ".fit").glob("error-*.txt")
    assert str(path) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("kept_often")
def test_tracked_is_as_untracked(arguments, tmp_path, whole, capsys):
    track = "--track=every=2,measures=sink-ratio"
    tracked, stopped = tmp_path / "tracked", tmp_path / "stopped"
    assert main([*with_value(arguments, "--out", str(tracked)), track]) == 0
    assert f"Measures: {tracked}/.fit" in capsys.readouterr().out
    assert (tracked / "report.html").exists()
    assert_same(tracked, whole)
    rows = read_tracked(tracked / ".fit")
    assert sorted({row.step for row in rows}) == [0, 2, 4]
    assert {row.measure for row in rows} == {"sink-ratio"}
    options = [*with_value(arguments, "--out", str(stopped)), track]
    with stopped_at(None, 3, interrupt):
        assert main(options) == 130
    assert main(options) == 0
    assert_same(stopped, whole)
    assert read_tracked(stopped / ".fit") == rows


@pytest.mark.slow
def test_balanced_training(arguments, tmp_path, capsys):
    uneven = write_images(tmp_path / "uneven", {"ClassA": 2, "ClassB": 7})
    options = [*with_value(arguments, "--data", str(uneven)), "--folds=0"]
    found = {}
    for balance in ([], ["--balance=loss"], ["--balance=sampling", "--batch-size=4"]):
        out = tmp_path / f"balanced{len(found)}"
        assert main([*options, *balance, "--out", str(out)]) == 0
        found[len(found)] = learned(out)[0]["context"]
        is_told = "class 'ClassB' has 7 images and 'ClassA' has 2" in capsys.readouterr().err
        assert is_told == (not balance)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--balance=sampling"], ["--balance sampling", "needs --batch-size"]),
        (["--folds=1"], ["--folds must be 0, or at least 2"]),
        (["--track=every=0"], ["--track", "every"]),
        (["--track=maps=2"], ["--track: fit keeps no maps"]),
        (["--inverse-penalty=3"], ["--inverse-penalty is no setting of tir"]),
        (["--shots=5"], ["class 'ClassA'", "3 readable images but 5 are needed", "--shots"]),
    ],
)
def test_refused(arguments, capsys, more, words):
    assert_refused(capsys, [*arguments, *more], *words)


@pytest.mark.parametrize("method", ["zero-shot", "tip-adapter"])
@pytest.mark.parametrize("balance", ["loss", "sampling"])
def test_methods_that_have_nothing_to_balance(data, tmp_path, capsys, method, balance):
    options = ["fit", "--data", str(data), "--model", "none", "--out", str(tmp_path / "out")]
    options += [f"--method={method}", f"--balance={balance}", "--batch-size=4"]
    assert_refused(capsys, options, f"--balance {balance}", f"method {method} has none")


def test_folders_of_other_things(arguments, tmp_path, whole, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert_refused(capsys, arguments, "holds other things (thesis.txt)")
    fewshot.load_classifier(whole).save(tmp_path / "saved")
    saved = with_value(arguments, "--out", str(tmp_path / "saved"))
    assert_refused(capsys, saved, "holds a classifier, and not what its fit needs to go on")


def test_one_process_alone(arguments, capsys, monkeypatch):
    values = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    values |= {"GROUP_WORLD_SIZE": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in values.items():
        monkeypatch.setitem(os.environ, name, value)
    assert main(arguments) == 2
    assert "by one process; start fit without torchrun" in capsys.readouterr().err
