"""The run folder: journal, settings, lock."""

import json
import multiprocessing
import os
import resource

import pytest

from tir_kernels.fewshot.errors import FewShotError
from tir_kernels.fewshot.journal import (
    Journal,
    Record,
    RunFolder,
    read_journal,
    skipped_images,
    write_json,
)


def record(episode, method="tir", **changes):
    values = {
        "classes": ("A", "Bä"),
        "correct": 3,
        "total": 4,
        "accuracy": 0.75,
        "final_loss": 0.5,
        "seconds": 1.25,
        "status": "ok",
    }
    return Record(episode=episode, method=method, **(values | changes))


FAILED = {"correct": None, "accuracy": None, "final_loss": None, "status": "non-finite loss"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "episodes.jsonl"


def test_records_round_trip(path):
    records = [
        record(0),
        record(0, "lora", **FAILED),
        record(1, seconds_per_step=0.1, support_accuracy=1.0, skipped=("A/1.png",)),
    ]
    journal = Journal(path)
    for entry in records:
        journal.append(entry)
    journal.close()
    assert read_journal(path) == records == journal.records
    assert skipped_images(records) == ["A/1.png"]
    again = Journal(path)
    assert again.records == records
    assert (1, "tir") in again
    assert (1, "lora") not in again
    assert again.note == ""
    again.close()


def test_lines_have_the_documented_keys(path):
    Journal(path).append(record(0))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    documented = "episode method classes correct total accuracy final_loss seconds status"
    assert list(json.loads(line))[:9] == documented.split()


@pytest.mark.parametrize("cut", [1, 20, None])
def test_torn_last_line_is_dropped_and_written_anew(path, cut):
    journal = Journal(path)
    journal.append(record(0))
    journal.close()
    # Without its line feed even a complete line counts as torn.
    path.write_bytes(path.read_bytes() + record(1).to_line()[:-1][:cut])
    assert read_journal(path) == [record(0)]
    journal = Journal(path)
    assert "torn" in journal.note
    assert (1, "tir") not in journal
    journal.append(record(1))
    journal.close()
    assert read_journal(path) == [record(0), record(1)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense", "Expecting value"),
        (b"", "Expecting value"),
        (b"\0\0\0", "Expecting value"),
        (b"\xff\xfe", "utf-8"),
        (b"[]", "not a JSON object"),
        (b"{}", "no 'episode'"),
        (record(1).to_line()[:-1].replace(b'"total": 4', b'"total": "4"'), "'total' is '4'"),
        (
            record(1).to_line()[:-1].replace(b'"correct": 3', b'"correct": true'),
            "'correct' is True",
        ),
        (record(1).to_line()[:-1].replace(b"0.75", b"null"), "without a result"),
        (record(1).to_line()[:-1].replace(b"0.75", b"NaN"), "NaN"),
    ],
)
def test_damaged_line_is_named(path, line, reason):
    content = record(0).to_line() + line + b"\n" + record(2).to_line()
    path.write_bytes(content)
    for read in (read_journal, Journal):
        with pytest.raises(FewShotError, match=f"line 2 of .*episodes.jsonl is damaged .*{reason}"):
            read(path)
    assert path.read_bytes() == content


def test_repeated_and_extended_records(path):
    newer = record(1).to_line().replace(b'"status"', b'"new_key": [1], "status"')
    path.write_bytes(record(0).to_line() + record(0, correct=1).to_line() + newer)
    assert read_journal(path) == [record(0), record(1)]


def test_full_disk_keeps_the_journal_readable(path):
    journal = Journal(path)
    journal.append(record(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The next line fits in part only, as on a disk that becomes full in the middle of it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, limits[1]))
    try:
        with pytest.raises(FewShotError, match=r"can't write .*episodes.jsonl: .*is kept"):
            journal.append(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_journal(path) == [record(0)]
    assert path.read_bytes().endswith(b"\n")
    assert (1, "tir") not in journal
    journal.append(record(1))
    assert read_journal(path) == [record(0), record(1)]
    journal.close()


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FewShotError, match=r"--out: can't write in .*file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(FewShotError, match="--out: can't write in /proc/none"):
        RunFolder("/proc/none")
    (tmp_path / "episodes.jsonl").mkdir()
    with pytest.raises(FewShotError, match=r"can't read .*episodes.jsonl"):
        Journal(tmp_path / "episodes.jsonl")
    with pytest.raises(FewShotError, match=r"can't write .*none/x.json"):
        write_json(tmp_path / "none" / "x.json", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write in read-only folders")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FewShotError, match=r"--out: can't write in .*Permission denied"):
        RunFolder(tmp_path)
    tmp_path.chmod(0o700)


def _try_folder(path, answer):
    try:
        RunFolder(path)
        answer.put("")
    except FewShotError as error:
        answer.put(str(error))


def _ask_other_process(path):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    other = context.Process(target=_try_folder, args=(path, answer))
    other.start()
    text = answer.get(timeout=30)
    other.join()
    return text


def test_one_process_at_a_time(tmp_path):
    with RunFolder(tmp_path):
        assert "another process is running in" in _ask_other_process(tmp_path)
        with pytest.raises(FewShotError, match="another process"):
            RunFolder(tmp_path)
    assert _ask_other_process(tmp_path) == ""


SETTINGS = {"ways": 5, "layers": (8, 10), "logit_scale": None}


def test_settings_are_kept_and_compared(tmp_path):
    path = tmp_path / "settings.json"
    with RunFolder(tmp_path) as folder:
        folder.claim(SETTINGS, 10, {"torch": "1"})
        folder.claim(SETTINGS, 10, {"torch": "2"})
        kept = json.loads(path.read_text())
        assert kept["about"] == {"torch": "1"}
        assert kept["episodes"] == 10
        with pytest.raises(FewShotError, match=r"--layers was 8,10, is 7; give the old"):
            folder.claim(SETTINGS | {"layers": (7,)}, 10, {})
        with pytest.raises(
            FewShotError, match=r"--ways was 5, is 4; --logit-scale was unset, is 2.0;"
        ):
            folder.claim(SETTINGS | {"ways": 4, "logit_scale": 2.0}, 10, {})
        assert json.loads(path.read_text()) == kept
        folder.claim(SETTINGS, 12, {})
        assert json.loads(path.read_text()) == kept | {"episodes": 12}
        with pytest.raises(FewShotError, match="12 episodes; --episodes may grow but not shrink"):
            folder.claim(SETTINGS, 11, {})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 1, "episodes": 2}'])
def test_damaged_settings(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with (
        RunFolder(tmp_path) as folder,
        pytest.raises(FewShotError, match=r"settings.json is damag"),
    ):
        folder.claim(SETTINGS, 1, {})


def test_journal_without_settings_is_refused(tmp_path):
    (tmp_path / "episodes.jsonl").write_bytes(record(0).to_line())
    with RunFolder(tmp_path) as folder, pytest.raises(FewShotError, match=r"no settings.json"):
        folder.claim(SETTINGS, 1, {})


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()
