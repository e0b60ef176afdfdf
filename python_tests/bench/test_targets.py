"""Targets from records made up for the purpose."""

import pytest
from sample_records import ATTENTION_SHAPE, OPERATOR_SHAPE, case_of, records_of

from bench.counting import fused_memory
from bench.records import make_record
from bench.report import findings, report, summary
from bench.shapes import Point
from bench.targets import TARGETS

PEERS = {
    "sdpa unweighted flash": 1.0,
    "sdpa unweighted cudnn": 0.8,
    "sdpa+mask efficient": 2.0,
    "flex_attention": 1.5,
}


def found(records, device="cuda"):
    return {(f.target.what, f.implementation): f for f in findings(records, device) if f.values}


def test_attention_is_compared_with_the_fastest_peer_of_each_kind():
    longer = case_of(shape=ATTENTION_SHAPE | {"L": 577})
    records = records_of(case_of(), {"tir triton": 0.6, **PEERS})
    records += records_of(longer, {"tir triton": 0.9, **PEERS})
    result = found(records)
    unweighted = result["attention forward, against the fastest unweighted attention", "tir triton"]
    assert unweighted.worst[0] == pytest.approx(0.9 / 0.8)
    assert unweighted.worst[1]["shape"]["L"] == 577
    assert [r["shape"]["L"] for r in unweighted.falls_short_at] == [577]
    masked = result["attention forward, against SDPA with a mask", "tir triton"]
    assert masked.worst[0] == pytest.approx(0.45)
    assert masked.falls_short_at == []
    flex = result["attention forward, against FlexAttention", "tir triton"]
    assert flex.worst[0] == pytest.approx(0.6)


def test_targets_apply_to_their_shapes_only():
    few_heads = case_of(shape=ATTENTION_SHAPE | {"B": 5})
    long_rows = case_of(shape=ATTENTION_SHAPE | {"L": 1024})
    wide = case_of(shape=ATTENTION_SHAPE | {"d": 128})
    half = case_of(dtype="float16")
    for case in (few_heads, long_rows, wide, half):
        assert found(records_of(case, {"tir triton": 9.0, **PEERS})) == {}


def test_the_reference_has_no_targets_and_missing_peers_no_values():
    assert found(records_of(case_of(), {"tir reference": 9.0, **PEERS})) == {}
    assert found(records_of(case_of(), {"tir triton": 9.0})) == {}


def test_gpu_targets_of_the_other_suites():
    tokens = {"B": 25, "L": 197, "D": 768, "E": 512, "C": 5}
    records = records_of(
        case_of(suite="relevance", operator="token_weights", shape=tokens),
        {"tir cuda": 0.3, "eager": 2.0, "torch.compile": 0.5},
    )
    whole = {"suite": "operator", "operator": "reweighted_attention", "shape": OPERATOR_SHAPE}
    records += records_of(
        case_of(**whole, direction="forward+backward"),
        {"tir cuda": 1.0, "eager": 2.0, "torch.compile sdpa+mask": 2.0},
    )
    host = case_of(**whole | {"operator": "reweighted_attention host time"})
    records += records_of(host, {"tir cuda": 0.014})
    many = case_of(shape=ATTENTION_SHAPE | {"B": 64})
    records.append(make_record(many, "tir cuda", ms=1.0, bound=0.55))
    values = {what: f.worst[0] for (what, _), f in found(records).items()}
    assert values == pytest.approx(
        {
            "token_weights of ViT-B/16, against eager": 0.15,
            "token_weights of ViT-B/16, against torch.compile": 0.6,
            "reweighted_attention forward + backward, against eager": 0.5,
            "reweighted_attention forward + backward, against torch.compile with SDPA": 0.5,
            "host time of a call": 14.0,
            "attention forward, share of the bound, B·H ≥ 768": 0.55,
        }
    )


def test_memory_is_compared_with_what_a_fused_call_needs():
    allowed = fused_memory(Point(197, 64, 25, 12, 5, "bfloat16"), "forward") / 2**20
    case = case_of(suite="memory", operator="reweighted_attention", shape=OPERATOR_SHAPE)
    records = [make_record(case, "tir cuda", mib=2 * allowed)]
    (finding,) = found(records).values()
    assert finding.worst[0] == pytest.approx(2.0)
    assert len(finding.falls_short_at) == 1


def test_cpu_targets():
    case = case_of(device="cpu", dtype="float32", direction="forward+backward")
    slow = case | {"shape": ATTENTION_SHAPE | {"L": 50}}
    peers = {"sdpa+mask": 1.2, "sdpa unweighted": 0.1, "eager": 1.3}
    records = records_of(case, {"tir cpu": 0.5, **peers})
    records += records_of(slow, {"tir cpu": 1.5, **peers})
    result = found(records, "cpu")
    name = "attention forward + backward float32, speed against SDPA with a mask"
    assert result[name, "tir cpu"].worst[0] == pytest.approx(0.8)
    best = result["every operator, speed against the best peer", "tir cpu"]
    assert best.worst[0] == pytest.approx(0.8)  # the unweighted attention computes something else
    assert [r["shape"]["L"] for r in best.falls_short_at] == [50]


STEP = {
    "suite": "step",
    "operator": "fine-tuning step, placement tokens",
    "direction": "forward+backward",
    "device": "cpu",
    "shape": {"B": 5, "L": 197, "D": 768, "C": 5},
}


def test_steps_are_compared_with_the_published_program_as_it_runs_on_a_cpu():
    times = {"tir cpu": 1.0, "published float32": 3.0}
    records = records_of(case_of(**STEP, dtype="float32"), times)
    records += records_of(
        case_of(**STEP, dtype="bfloat16"), {**times, "tir cpu": 0.5, "published bfloat16": 1.5}
    )
    larger = STEP | {"shape": STEP["shape"] | {"B": 25}}
    records += records_of(case_of(**larger, dtype="float32"), {"tir cpu": 9.0, **times})
    values = {what: f.worst[0] for (what, _), f in found(records, "cpu").items()}
    of_steps = {what: value for what, value in values.items() if what.startswith("step in")}
    assert list(of_steps.values()) == [3.0, 6.0]
    assert ["float32" in what for what in of_steps] == [True, True]
    assert not any("eager" in what for what in of_steps)


def test_memory_of_steps_is_compared_with_the_published_program():
    case = case_of(**STEP | {"suite": "memory", "operator": "fine-tuning step"}, dtype="bfloat16")
    peaks = {"tir cpu": 450.0, "published float32": 1600.0, "published bfloat16": 1000.0}
    records = [make_record(case, name, mib=peak) for name, peak in peaks.items()]
    ((what, name),) = found(records, "cpu")
    assert (what, name) == (
        "fine-tuning step, peak memory against the published program",
        "tir cpu",
    )
    assert found(records, "cpu")[what, name].worst[0] == pytest.approx(0.45)
    assert found(records[:1], "cpu") == {}
    skipped = make_record(case, "published float32", skipped="the process died")
    assert found([records[0], skipped], "cpu") == {}


def run_of(**changes):
    shape = {"ways": 5, "shots": 5, "L": 197, "D": 768, "queries": 15, "steps": 100}
    return {
        "suite": "episodes",
        "operator": "whole run, tir (eurosat, ViT-B-16)",
        "direction": "forward+backward",
        "shape": shape | changes,
    }


def test_whole_runs_on_a_gpu():
    times = {"tir auto": 900.0, "tir auto, 8 at once": 400.0, "published bfloat16": 9000.0}
    records = records_of(case_of(**run_of()), times)
    records += records_of(case_of(**run_of(shots=1)), times)
    other = case_of(**run_of() | {"operator": "whole run, lora (eurosat, ViT-B-16)"})
    records.append(make_record(other, "tir auto, 8 at once", ms=1.0, bound=0.5))
    values = {key: f.worst[0] for key, f in found(records).items()}
    speed = "whole run, 5-way {}-shot, ViT-B/16, speed against the published program"
    share = "whole run, 5-way 5-shot, ViT-B/16, model FLOPs over the rate of a large product"
    assert values == pytest.approx(
        {
            (speed.format(shots), name): value
            for shots in (5, 1)
            for name, value in (("tir auto", 10.0), ("tir auto, 8 at once", 22.5))
        }
        | {(share, "tir auto, 8 at once"): 0.5}
    )
    for changes in ({"D": 192}, {"steps": 10}, {"queries": 1}):
        assert found(records_of(case_of(**run_of(**changes)), times)) == {}


def test_whole_runs_and_the_start_on_a_cpu():
    small = case_of(**run_of(D=192), device="cpu", dtype="float32")
    records = records_of(small, {"tir auto": 1000.0, "published float32": 3500.0})
    start = run_of() | {"operator": "start-up to the first step (drawings, demo)"}
    records += records_of(case_of(**start, device="cpu"), {"tir auto": 12_000.0})
    result = found(records, "cpu")
    assert {what: f.worst[0] for (what, _), f in result.items()} == {
        "whole run, 5-way 5-shot, ViT-Ti/16 in float32, speed against the published program": 3.5,
        "start-up to the first step, files in cache": 12.0,
    }
    rows = [row for block in summary(records, "cpu", only_measured=True).blocks for row in block]
    assert ("≤ 10.0 s", "tir auto", "12.0 s") in [row[1:4] for row in rows]


def test_summary_names_shapes_and_what_was_not_measured():
    records = records_of(case_of(), {"tir triton": 0.9, **PEERS})
    rows = [row for block in summary(records, "cuda").blocks for row in block]
    assert len(rows) == len(TARGETS["cuda"])
    short = next(row for row in rows if row[0].endswith("fastest unweighted attention"))
    assert short[1:4] == ("≤ 1.00×", "tir triton", "1.12×")
    assert short[5] == "0 of 1"
    assert "B=25 H=12 L=197 d=64" in short[6]
    assert [row[3] for row in rows].count("not measured") == len(TARGETS["cuda"]) - 3
    measured = summary(records, "cuda", only_measured=True)
    assert len(measured.blocks) == 3


def test_report_has_targets_environment_and_tables():
    text = report(records_of(case_of(), {"tir triton": 0.9, **PEERS}))
    assert "- torch: 2.15" in text
    assert "### Targets on cuda" in text
    assert "### attention: weighted_attention, forward, bfloat16, cuda" in text
    assert "| B=25 H=12 L=197 d=64 | flex_attention | 1.500 ms | 1.67 |" in text
