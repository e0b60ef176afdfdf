"""Measures beside a journal: what is written, what counts, what is read."""

import json
import math

import pytest
from fewshot.run.test_journal import record

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.run import journal, tracked
from tir_kernels.fewshot.run.appended import read_from
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.tracked import (
    Series,
    Track,
    Tracked,
    TrackFile,
    read_tracked,
    read_tracks,
)


def track(episode, arm="tir", value=0.25):
    ratio = Series("sink-ratio", "ratio", [0, 1], [[0.0, 0.5]], [[value, None], [1 / 3, 2.0]])
    gap = Series("gap", "modality gap", [None], [[None], [0.5]], [[1.0], [2.0]])
    return Track(episode, arm, [0, 10], [ratio, gap])


def write(folder, name, *entries):
    """A journal and its tracks; of an entry without a record there is the track alone."""
    journal = Journal(folder / name)
    tracks = TrackFile(journal.path)
    for own, is_recorded in entries:
        tracks.append(own)
        if is_recorded:
            journal.append(record(own.episode, own.arm))
    journal.close()
    tracks.close()


def test_rows_round_trip(tmp_path):
    write(tmp_path, "episodes.jsonl", (track(1), True), (track(0, "lora"), True))
    rows = read_tracked(tmp_path)
    assert rows[:4] == [
        Tracked(0, "lora", 0, 0, "sink-ratio", "ratio", 0.25, 0.0),
        Tracked(0, "lora", 0, 1, "sink-ratio", "ratio", None, 0.5),
        Tracked(0, "lora", 10, 0, "sink-ratio", "ratio", 0.333333, 0.0),
        Tracked(0, "lora", 10, 1, "sink-ratio", "ratio", 2.0, 0.5),
    ]
    assert rows[4:6] == [
        Tracked(0, "lora", 0, None, "gap", "modality gap", 1.0, None),
        Tracked(0, "lora", 10, None, "gap", "modality gap", 2.0, 0.5),
    ]
    assert [row._replace(episode=0, arm="lora") for row in rows[6:]] == rows[:6]


def test_a_run_without_tracks_has_no_rows(tmp_path):
    Journal(tmp_path / "episodes.jsonl").append(record(0))
    assert read_tracked(tmp_path) == []


def test_none_found_is_no_number(tmp_path):
    write(tmp_path, "episodes.jsonl", (track(0, value=math.nan), True))
    assert read_tracked(tmp_path)[0].value is None


def test_rows_count_when_the_journal_has_the_record(tmp_path):
    write(tmp_path, "episodes.jsonl", (track(0), True), (track(1), False))
    assert [each.episode for each in read_tracks(tmp_path)] == [0]


def test_a_training_run_again_takes_the_place_of_the_first(tmp_path):
    write(tmp_path, "episodes.jsonl", (track(0), False))
    write(tmp_path, "episodes.jsonl", (track(0, value=0.75), True))
    (read,) = read_tracks(tmp_path)
    assert read.series[0].values[0][0] == 0.75


def test_what_another_process_left_does_not_count(tmp_path):
    """The process of the record tells, whatever the numbers of the two."""
    write(tmp_path, "episodes.jsonl", (track(0), False), (track(1, value=0.125), True))
    write(tmp_path, "episodes.2.jsonl", (track(1), False), (track(0, value=0.75), True))
    assert (tmp_path / "tracked.2.jsonl").exists()
    assert [each.series[0].values[0][0] for each in read_tracks(tmp_path)] == [0.75, 0.125]


def test_journals_are_read_once_and_tracks_one_by_one(tmp_path, monkeypatch):
    write(tmp_path, "episodes.jsonl", *((track(n), True) for n in range(3)))
    read, parse = [], tracked._parsed
    monkeypatch.setattr(
        journal, "read_from", lambda path, start=0: read.append(path.name) or read_from(path, start)
    )
    parsed = []
    monkeypatch.setattr(tracked, "_parsed", lambda *line: parsed.append(line[1]) or parse(*line))
    tracks = read_tracks(tmp_path)
    assert next(tracks).episode == 0
    assert parsed == [1, 2, 3, 1], "all are looked at, and one is kept"
    assert [each.episode for each in tracks] == [1, 2]
    assert read == ["episodes.jsonl"]


@pytest.mark.parametrize("cut", [1, 20, None])
def test_torn_last_line_is_dropped_and_written_anew(tmp_path, cut):
    write(tmp_path, "episodes.jsonl", (track(0), True))
    path = tmp_path / "tracked.jsonl"
    path.write_bytes(path.read_bytes() + track(1).to_line()[:-1][:cut])
    assert [each.episode for each in read_tracks(tmp_path)] == [0]
    write(tmp_path, "episodes.jsonl", (track(1), True))
    assert [each.episode for each in read_tracks(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("steps"), "steps"),
        (lambda content: content.update(episode="0"), "parts"),
        (lambda content: content["series"][0]["values"].pop(), "parts"),
        (lambda content: content["series"][0]["values"][0].pop(), "parts"),
        (lambda content: content["series"][0]["values"][0].__setitem__(0, "x"), "parts"),
        (lambda content: content["series"][0].update(extra=1), "extra"),
        (lambda content: content.update(series=3), "not iterable"),
    ],
)
def test_damaged_line_is_named(tmp_path, change, reason):
    write(tmp_path, "episodes.jsonl", (track(0), True))
    content = json.loads(track(1).to_line())
    change(content)
    path = tmp_path / "tracked.jsonl"
    path.write_bytes(path.read_bytes() + json.dumps(content).encode() + b"\n")
    with pytest.raises(FewShotError, match=f"line 2 of .*tracked.jsonl is damaged .*{reason}"):
        read_tracked(tmp_path)


def test_lines_are_compact():
    series = [
        Series("m", f"quantity {index}", list(range(12)), [[0.0] * 12], [[1 / 3] * 12] * 26)
        for index in range(60)
    ]
    assert len(Track(0, "tir", list(range(26)), series).to_line()) < 10 * 60 * 12 * 26
