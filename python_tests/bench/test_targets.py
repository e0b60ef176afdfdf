"""Targets from records made up for the purpose."""

import pytest
from sample_records import ATTENTION_SHAPE, OPERATOR_SHAPE, case_of, records_of

from bench.counting import fused_memory
from bench.records import make_record
from bench.report import report
from bench.targets import TARGETS, Finding, findings, summary

PEERS = {
    "sdpa unweighted flash": 1.0,
    "sdpa unweighted cudnn": 0.8,
    "sdpa+mask efficient": 2.0,
    "flex_attention": 1.5,
}


def found(records, device="cuda"):
    return {
        (f.target.what, f.implementation): f
        for f in findings(records, device)
        if isinstance(f, Finding)
    }


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
    allowed = fused_memory(25, 12, 197, 64, 1, 5, 2, "forward") / 2**20
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
