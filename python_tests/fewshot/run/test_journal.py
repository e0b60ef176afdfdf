"""Journals: what is written, what is read, what is repaired."""

import json
import os
import resource
import shutil
from dataclasses import replace

import pytest

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.run.journal import (
    Journal,
    JournalReader,
    journal_name,
)
from tir_kernels.fewshot.run.records import Record, RunShape, skipped_images


def record(episode, arm="tir", **changes):
    values = {
        "classes": ("A", "Bä"),
        "correct": 3,
        "total": 4,
        "accuracy": 0.75,
        "final_loss": 0.5,
        "seconds": 1.25,
        "status": "ok",
    }
    return Record(episode=episode, arm=arm, **(values | changes))


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
    assert JournalReader(path.parent).news() == records == journal.news() == journal.records
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
    documented = "episode arm classes correct total accuracy final_loss seconds status"
    assert list(json.loads(line))[:9] == documented.split()


@pytest.mark.parametrize("cut", [1, 20, None])
def test_torn_last_line_is_dropped_and_written_anew(path, cut):
    journal = Journal(path)
    journal.append(record(0))
    journal.close()
    # Without its line feed even a complete line counts as torn.
    path.write_bytes(path.read_bytes() + record(1).to_line()[:-1][:cut])
    assert JournalReader(path.parent).news() == [record(0)]
    journal = Journal(path)
    assert "torn" in journal.note
    assert (1, "tir") not in journal
    journal.append(record(1))
    journal.close()
    assert JournalReader(path.parent).news() == [record(0), record(1)]


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
        (record(1, accuracy=5.0).to_line()[:-1], "'accuracy' is 5.0"),
        (record(1, accuracy=0.5).to_line()[:-1], "'accuracy' is 0.5, but 3 of 4"),
        (record(1, correct=5).to_line()[:-1], "'correct' is 5 of 4"),
        (record(1, correct=0, total=0, accuracy=0.0).to_line()[:-1], "'correct' is 0 of 0"),
        (record(1, correct=-1).to_line()[:-1], "'correct' is -1"),
        (record(1, total=10**400).to_line()[:-1], "'total' is 1000"),
        (record(-1).to_line()[:-1], "'episode' is -1"),
        (record(1, seconds=-1.0).to_line()[:-1], "'seconds' is -1.0"),
        (record(1).to_line()[:-1].replace(b"1.25", b"1e999"), "'seconds' is inf"),
        (record(1, status="stopped").to_line()[:-1], "a result beside the status 'stopped'"),
        (record(1, classes=("A", 3)).to_line()[:-1], "'classes' is"),
        (record(1, skipped=(None,)).to_line()[:-1], "'skipped' is"),
        (record(1, support_accuracy=1.5).to_line()[:-1], "'support_accuracy' is 1.5"),
        (record(1, arm="").to_line()[:-1], "'arm' is ''"),
        (record(1, classes=("A", "A")).to_line()[:-1], "a class is there twice"),
        (record(1).to_line()[:-2] + b', "correct": 1}', "'correct' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (record(1).to_line()[:-1].replace(b"0.75", b"NaN"), "NaN"),
    ],
)
def test_damaged_line_is_named(path, line, reason):
    content = record(0).to_line() + line + b"\n" + record(2).to_line()
    path.write_bytes(content)
    for read in (lambda path: JournalReader(path.parent).news(), Journal):
        with pytest.raises(FewShotError, match=f"line 2 of .*episodes.jsonl is damaged .*{reason}"):
            read(path)
    assert path.read_bytes() == content


def test_repeated_and_extended_records(path):
    newer = record(1).to_line().replace(b'"status"', b'"new_key": [1], "status"')
    path.write_bytes(record(0).to_line() + record(0, correct=1, accuracy=0.25).to_line() + newer)
    assert JournalReader(path.parent).news() == [record(0), record(1)]


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
    assert JournalReader(path.parent).news() == [record(0)]
    assert path.read_bytes().endswith(b"\n")
    assert (1, "tir") not in journal
    journal.append(record(1))
    assert JournalReader(path.parent).news() == [record(0), record(1)]
    journal.close()


def test_journals_are_read_as_they_grow(tmp_path):
    reader = JournalReader(tmp_path)
    assert reader.news() == []
    journals = [Journal(tmp_path / journal_name(number)) for number in range(3)]
    journals[1].append(record(0))
    journals[0].append(record(1))
    assert reader.news() == [record(1), record(0)]
    assert (2, "tir") not in reader
    line = record(2).to_line()
    with open(tmp_path / journal_name(5), "ab", buffering=0) as other:
        other.write(line[:40])
        assert reader.news() == []
        other.write(line[40:] + record(3).to_line()[:5])
        assert reader.news() == [record(2)]
    assert (2, "tir") in reader
    journals[2].append(record(0, correct=1, accuracy=0.25))
    journals[2].append(record(4))
    for journal in journals:
        journal.close()
    assert reader.news() == [record(4)]
    assert reader.repeats == 1
    assert reader.records == [record(1), record(0), record(2), record(4)]
    # Its owner cuts the torn line off and writes another; lines are counted on.
    journal = Journal(tmp_path / journal_name(5))
    journal.append(record(6))
    journal.close()
    assert reader.news() == [record(6)]
    with open(tmp_path / journal_name(5), "ab") as other:
        other.write(record(7).to_line() + b"?\n")
    with pytest.raises(FewShotError, match=r"line 4 of .*episodes.5.jsonl is damaged"):
        reader.news()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"episode": 7}, "'episode' is 7 in a run of 3"),
        ({"arm": "maple"}, "'arm' is 'maple' in a run of tir, lora"),
        ({"classes": ("A",)}, "'classes' are 1 in a run of 2 ways"),
        ({"total": 6, "accuracy": 0.5}, "'total' is 6 in a run of 4 queries an episode"),
    ],
)
def test_records_that_are_not_of_the_run(tmp_path, changes, reason):
    shape = RunShape(episodes=3, arms=("tir", "lora"), ways=2, queries=2)
    stray = replace(record(1), **changes)
    (tmp_path / journal_name(2)).write_bytes(record(0).to_line() + stray.to_line())
    with pytest.raises(FewShotError, match=f"line 2 of .*episodes.2.jsonl is damaged .{reason}"):
        JournalReader(tmp_path, shape).news()
    reader = JournalReader(tmp_path)
    assert len(reader.news()) == 2
    with pytest.raises(FewShotError, match=reason):
        reader.require(shape)


def test_only_names_that_the_program_writes_are_journals(tmp_path):
    others = ["episodes-old.jsonl", "episodes.jsonl.bak", "episodes (copy).jsonl"]
    others += ["episodes.01.jsonl", "episodes.0.jsonl", "episodes.1 (conflicted copy).jsonl"]
    others += ["episodes.x.jsonl", "Episodes.jsonl", "episodes.jsonl~", ".episodes.jsonl.swp"]
    for name in others:
        (tmp_path / name).write_bytes(record(0).to_line())
    assert JournalReader(tmp_path).news() == []
    (tmp_path / "episodes.12.jsonl").write_bytes(record(1).to_line())
    assert JournalReader(tmp_path).news() == [record(1)]


def test_a_pipe_is_no_journal(tmp_path):
    os.mkfifo(tmp_path / "episodes.jsonl")
    with pytest.raises(FewShotError, match="not a regular file"):
        JournalReader(tmp_path).news()


def test_any_name_survives(path):
    names = (os.fsdecode(b"for\xeat"), "W\u0308ald", "森", "\x1b[2J", "a\nb\u2028c")
    entry = record(0, classes=names, skipped=names)
    journal = Journal(path)
    journal.append(entry)
    journal.close()
    assert JournalReader(path.parent).news() == [entry]
    path.read_bytes().decode()


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def write_anew(path):
    content = path.read_bytes()
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)


def write_other(path):
    path.write_bytes(record(5).to_line() + record(6).to_line())


def add(path):
    with open(path, "ab") as file:
        file.write(record(9).to_line())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: path.unlink(), "removed"),
        (write_anew, "replaced"),
        (cut, "cut short"),
        (add, "written to"),
        (lambda path: shutil.rmtree(path.parent), "removed"),
    ],
)
def test_a_journal_that_others_change_while_it_is_written(tmp_path, change, what):
    path = tmp_path / "run" / "episodes.jsonl"
    path.parent.mkdir()
    journal = Journal(path)
    journal.append(record(0))
    change(path)
    for act in (journal.news, lambda: journal.append(record(1))):
        with pytest.raises(FewShotError, match=f"episodes.jsonl was {what} by another program"):
            act()
    journal.close()


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda path: path.unlink(), "removed"), (write_other, "replaced"), (cut, "cut short")],
)
def test_a_journal_that_changes_while_it_is_read(path, change, what):
    path.write_bytes(record(0).to_line())
    reader = JournalReader(path.parent)
    assert reader.news() == [record(0)]
    write_anew(path)  # as a program does that synchronises folders: it is the same file still
    assert reader.news() == []
    change(path)
    with pytest.raises(FewShotError, match=f"episodes.jsonl was {what} by another program"):
        reader.news()
