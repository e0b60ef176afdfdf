"""Cases are checked, timed, recorded and not run twice."""

import dataclasses
import io
import json
import time

import click
import pytest
import torch
from rich.console import Console

from bench import runner
from bench.cases import Case, Implementation, WrongResultError
from bench.counting import Cost
from bench.records import KEYS, RecordFile, load_records
from bench.runner import Runner
from bench.settings import Settings

pytestmark = pytest.mark.usefixtures("low_ceilings")


def case_of(*implementations, size=1, **options):
    return Case(
        suite="attention",
        operator="sleep",
        device="cpu",
        dtype="float32",
        shape={"L": size},
        direction="forward",
        make_inputs=lambda: size,
        implementations=implementations,
        measure=lambda calls, seconds: [{"ms": call()} for call in calls],
        **options,
    )


def taking(name, milliseconds, **options):
    return Implementation(name, lambda inputs: lambda: milliseconds, **options)


def failing(name, error):
    def prepare(inputs):
        raise error

    return Implementation(name, prepare)


def run(cases, records=None, deadline=None):
    console = Console(file=io.StringIO(), width=200)
    records = records or RecordFile()
    own = Runner(Settings(compiles=False), records, {"torch": "2"}, console)
    outcome = own.run(cases, deadline)
    return outcome, records.records, console.file.getvalue()


def test_rates_and_fraction_of_the_bound(monkeypatch):
    cost = Cost(3_000, 8_000_000)
    rates = iter((3e9, 5e9))  # before and after
    monkeypatch.setattr(runner, "flops_per_second", lambda device, dtype: next(rates))
    _, (record,), _ = run([case_of(taking("tir cpu", 2.0), cost=cost)])
    assert tuple(record)[: len(KEYS)] == KEYS
    assert set(record) == {*KEYS, "environment"}
    assert record["ms"] == 2.0
    assert record["gbps"] == pytest.approx(0.0015)
    assert record["tflops"] == pytest.approx(0.004)
    assert record["fraction_of_bound"] == pytest.approx(1.0)  # 8 M at 4 G a second


def test_a_wrong_implementation_is_never_timed():
    def prepare(inputs):
        raise WrongResultError("output is off by 0.3 of its norm")

    outcome, records, text = run([case_of(taking("eager", 1.0), Implementation("bad", prepare))])
    assert outcome.wrong == 1
    assert records[1]["ms"] is None
    assert "off by 0.3" in records[1]["wrong"]
    assert "WRONG: bad" in text
    assert records[0]["ms"] == 1.0


def test_what_fails_is_left_out_with_its_reason():
    cases = [
        case_of(
            taking("eager", 1.0),
            failing("flex", RuntimeError("no such\nkernel")),
            taking("never", 1.0, unavailable="not on this device"),
            taking("big", 1.0, scratch_bytes=2**60),
        )
    ]
    _, records, text = run(cases)
    assert records[1]["skipped"] == "RuntimeError: no such kernel"
    assert records[2]["unavailable"] == "not on this device"
    assert "GiB free" in records[3]["skipped"]
    for part in ("without flex", "without never: not on this device", "without big: needs about"):
        assert part in text


@pytest.mark.parametrize(
    "options", [{"cost": Cost(1, 10**18)}, {"input_bytes": 2**60}], ids=["time", "memory"]
)
def test_too_large_a_case_is_left_out_visibly(options):
    _, (record,), text = run([case_of(taking("eager", 1.0), **options)])
    assert record["ms"] is None
    assert record["skipped"]
    assert "left out" in text


def test_out_of_memory_leaves_the_case_out():
    def measure(calls, seconds):
        raise torch.OutOfMemoryError("tried to allocate 900 GiB")

    case = dataclasses.replace(case_of(taking("eager", 1.0)), measure=measure)
    _, records, text = run([case, case_of(taking("eager", 2.0), size=2)])
    assert "900 GiB" in records[0]["skipped"]
    assert "900 GiB" in text
    assert records[1]["ms"] == 2.0


def test_restart_runs_only_what_is_missing(tmp_path):
    path = tmp_path / "records.json"
    small, large = (case_of(taking("eager", size), size=size) for size in (1, 2))
    run([small], RecordFile(path))
    assert [r["ms"] for r in json.loads(path.read_text())] == [1]
    changed = case_of(taking("eager", 100.0), size=1)
    outcome, records, _ = run([changed, large], RecordFile(path))
    assert (outcome.measured, outcome.kept) == (1, 1)
    assert [r["ms"] for r in records] == [1, 2]
    assert load_records(path) == records


def test_restart_tries_again_what_was_wrong_unavailable_or_left_out_as_a_whole():
    for first in (
        case_of(taking("eager", 1.0), failing("ours", WrongResultError("off"))),
        case_of(taking("eager", 1.0), taking("ours", 1.0, unavailable="--no-compile")),
        case_of(taking("eager", 1.0), taking("ours", 1.0), input_bytes=2**60),
    ):
        records = RecordFile()
        run([first], records)
        _, found, _ = run([case_of(taking("eager", 1.0), taking("ours", 5.0))], records)
        assert [r["ms"] for r in found] == [1.0, 5.0]


def test_a_failure_that_was_seen_is_not_tried_again():
    records = RecordFile()
    case = case_of(taking("eager", 1.0), failing("flex", RuntimeError("unsupported")))
    run([case], records)
    assert run([case], records)[0].kept == 1


def test_interrupt_keeps_records(tmp_path):
    path = tmp_path / "records.json"
    stopped = case_of(failing("eager", KeyboardInterrupt()), size=2)
    outcome, records, _ = run([case_of(taking("eager", 1.0)), stopped], RecordFile(path))
    assert outcome.interrupted
    assert len(records) == len(load_records(path)) == 1


def test_no_shape_is_begun_after_the_deadline():
    outcome, records, _ = run([case_of(taking("eager", 1.0))], deadline=time.monotonic() - 1)
    assert outcome.out_of_time == 1
    assert records == []


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '[{"suite": "attention"}]'])
def test_other_files_are_not_overwritten(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(click.ClickException, match=r"other\.json"):
        RecordFile(path)
    assert path.read_text() == content
