"""The run folder: settings, the records of all its journals, and who may be in it."""

import json
import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from test_journal import record

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.run.folder import RunFolder, read_run, write_json
from tir_kernels.fewshot.run.journal import Journal, journal_name


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FewShotError, match=r"^out: can't write in .*file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(FewShotError, match=r"^out: can't write in /proc/none"):
        RunFolder("/proc/none")
    (tmp_path / "episodes.jsonl").mkdir()
    with pytest.raises(FewShotError, match=r"can't read .*episodes.jsonl"):
        Journal(tmp_path / "episodes.jsonl")
    with pytest.raises(FewShotError, match=r"can't write .*none/x.json"):
        write_json(tmp_path / "none" / "x.json", {})


def _ask(question, *arguments):
    """What another process answers: "" or the text of its error."""

    def run():
        try:
            question(*arguments)
            answer.put("")
        except FewShotError as error:
            answer.put(str(error))

    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    other = context.Process(target=run)
    other.start()
    text = answer.get(timeout=30)
    other.join()
    return text


def test_read_only_folder():
    with tempfile.TemporaryDirectory() as name:
        # Root may write anywhere, so the question is asked as somebody else.
        os.chmod(name, 0o755)
        folder = Path(name, "run")
        folder.mkdir()
        (folder / "episodes.jsonl").write_bytes(record(0).to_line())
        folder.chmod(0o555)

        def question():
            if os.geteuid() == 0:
                os.seteuid(65534)
            assert read_run(folder) == [record(0)]
            RunFolder(folder)

        text = _ask(question)
        folder.chmod(0o755)
    assert "out: can't write in " in text
    assert "Permission denied" in text


def test_one_run_at_a_time(tmp_path):
    with RunFolder(tmp_path):
        text = _ask(RunFolder, tmp_path)
        assert "another process is running in" in text
        assert f"process {os.getpid()} on " in text
    assert _ask(RunFolder, tmp_path) == ""


def test_a_killed_process_leaves_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    inside = context.Event()

    def stay():
        with RunFolder(tmp_path):
            inside.set()
            time.sleep(60)

    other = context.Process(target=stay)
    other.start()
    assert inside.wait(30)
    with pytest.raises(FewShotError, match=f"process {other.pid} on"):
        RunFolder(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    RunFolder(tmp_path).__exit__(None, None, None)


def test_a_run_is_read_from_all_its_journals(tmp_path):
    settings = {"settings": {"method": ["tir", "lora"]}, "episodes": 3}
    write_json(tmp_path / "settings.json", settings)
    written = {
        0: [record(1, "lora"), record(2)],
        1: [record(0, "lora"), record(0)],
        2: [record(1), record(2, correct=1, accuracy=0.25)],
        10: [record(2, correct=2, accuracy=0.5)],
    }
    for number, records in written.items():
        journal = Journal(tmp_path / journal_name(number))
        for entry in records:
            journal.append(entry)
        journal.close()
    for number in (1, 2):
        with open(tmp_path / journal_name(number), "ab") as file:
            file.write(record(3).to_line()[: 30 * number])
    # By episode and arm, and of what was written twice the first journal's.
    expected = [record(0), record(0, "lora"), record(1), record(1, "lora"), record(2)]
    assert read_run(tmp_path) == expected
    (tmp_path / "settings.json").unlink()
    by_name = [record(0, "lora"), record(0), record(1, "lora"), record(1), record(2)]
    assert read_run(tmp_path) == by_name


def test_runs_that_cannot_be_read(tmp_path):
    with pytest.raises(FewShotError, match=r"can't read .*none"):
        read_run(tmp_path / "none")
    assert read_run(tmp_path) == []
    (tmp_path / "episodes.jsonl").write_bytes(record(0).to_line())
    damaged = record(1).to_line() + b"???\n" + record(2).to_line()
    (tmp_path / "episodes.1.jsonl").write_bytes(damaged)
    with pytest.raises(FewShotError, match=r"line 2 of .*episodes.1.jsonl is damaged"):
        read_run(tmp_path)
    with pytest.raises(FewShotError, match=r"line 2 of .*episodes.1.jsonl is damaged"):
        Journal(tmp_path / "episodes.jsonl")


SETTINGS = {"ways": 5, "layers": (8, 10), "logit_scale": None}


def test_settings_are_kept_and_compared(tmp_path):
    path = tmp_path / "settings.json"
    with RunFolder(tmp_path) as folder:
        folder.claim(SETTINGS, 10, {"torch": "1"})
        folder.claim(SETTINGS, 10, {"torch": "2"})
        kept = json.loads(path.read_text())
        assert kept["about"] == {"torch": "1"}
        assert kept["episodes"] == 10
        with pytest.raises(FewShotError, match=r"layers was 8,10, is 7; give the old"):
            folder.claim(SETTINGS | {"layers": (7,)}, 10, {})
        with pytest.raises(FewShotError, match=r"ways was 5, is 4; logit_scale was unset, is 2.0;"):
            folder.claim(SETTINGS | {"ways": 4, "logit_scale": 2.0}, 10, {})
        assert json.loads(path.read_text()) == kept
        folder.claim(SETTINGS, 12, {})
        assert json.loads(path.read_text()) == kept | {"episodes": 12}
        with pytest.raises(FewShotError, match="12 episodes; episodes may grow but not shrink"):
            folder.claim(SETTINGS, 11, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        '{"settings": 1, "episodes": 2}',
        '{"settings": {}, "episodes": 0}',
        '{"settings": {}, "episodes": 1e999}',
        '{"settings": {"method": "tir"}, "episodes": 1}',
        '{"settings": {"method": [1]}, "episodes": 1}',
        '{"settings": {"ways": "5"}, "episodes": 1}',
        '{"settings": {"lora_lr": NaN}, "episodes": 1}',
    ],
)
def test_damaged_settings(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    for act in (RunFolder, read_run):
        with pytest.raises(FewShotError, match=r"settings.json is damaged, or not of a run \("):
            act(tmp_path)
    assert (tmp_path / "settings.json").read_text() == text


def test_journal_without_settings_is_refused(tmp_path):
    (tmp_path / "episodes.jsonl").write_bytes(record(0).to_line())
    with RunFolder(tmp_path) as folder, pytest.raises(FewShotError, match=r"no settings.json"):
        folder.claim(SETTINGS, 1, {})


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_json_keeps_any_name(tmp_path):
    content = {os.fsdecode(b"for\xeat"): "森"}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content


def test_a_planted_link_leads_nowhere(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / f".x.json.{os.getpid()}.partial").symlink_to(tmp_path / "precious")
    (tmp_path / ".x.json.partial").symlink_to(tmp_path / "precious")
    write_json(tmp_path / "x.json", {})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "  ", "a\0b", "x" * 300])
def test_names_that_no_folder_can_have(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FewShotError, match="out"):
        RunFolder(name)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_is_removed_is_noticed(tmp_path):
    with RunFolder(tmp_path) as folder:
        with folder.episodes(range(3), 1) as held:
            assert held == [0]
        (tmp_path / ".lock").unlink()
        RunFolder(tmp_path).__exit__(None, None, None)
        with (
            pytest.raises(FewShotError, match=r"\.lock was removed or replaced"),
            folder.episodes(range(3), 1),
        ):
            pass


def test_a_record_beyond_the_run_is_named(tmp_path):
    settings = {"settings": {"method": ["tir"], "ways": 2, "queries": 2}, "episodes": 1}
    write_json(tmp_path / "settings.json", settings)
    (tmp_path / "episodes.jsonl").write_bytes(record(0).to_line() + record(1).to_line())
    with pytest.raises(FewShotError, match=r"line 2 of .*'episode' is 1 in a run of 1"):
        read_run(tmp_path)


def test_a_run_from_before_there_were_arms_is_read(tmp_path):
    old = {
        "episode": 0,
        "classes": ["a", "b"],
        "correct": 1,
        "total": 2,
        "accuracy": 0.5,
        "final_loss": 1.25,
        "seconds": 1.0,
        "status": "ok",
    }
    lines = [json.dumps({**old, "method": method}) for method in ("lora", "tir")]
    (tmp_path / "episodes.jsonl").write_text("".join(f"{line}\n" for line in lines))
    settings = {"settings": {"method": ["tir", "lora"], "ways": 2, "queries": 1}, "episodes": 1}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert [record.arm for record in read_run(tmp_path)] == ["tir", "lora"]
