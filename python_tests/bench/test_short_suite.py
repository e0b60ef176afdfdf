"""The suite of short rows: its shapes, and peers of single queries and of causal attention."""

import importlib.util

import pytest
import torch

from bench.cases import WrongResultError
from bench.counting import attention_cost
from bench.formulas import plain_attention
from bench.peers import FLEX_FLASH, TOME, Peer
from bench.problems import AttentionProblem
from bench.settings import Settings
from bench.shapes import Point
from bench.suites.operators import WEIGHTED_ATTENTION
from bench.suites.short import short_cases

SIZES = {"length": 9, "head_dim": 8, "images": 3, "heads": 2, "num_classes": 3}
UNUSUAL = {
    "one query": {"queries": 1},
    "causal": {"is_causal": True},
    "causal, fewer queries": {"queries": 5, "is_causal": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_all_peers_are_right(name: str, direction: str, dtype: str) -> None:
    torch.manual_seed(0)
    problem = AttentionProblem(Point(**SIZES, dtype=dtype, **UNUSUAL[name]), "cpu")
    tried = []
    for peer in WEIGHTED_ATTENTION.peers(Settings(compiles=False)):
        if not peer.unavailable:
            problem.verify(peer.build(problem), direction, is_weighted=peer.is_weighted)
            tried.append(peer.name)
    assert TOME in tried
    assert len(tried) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("name", UNUSUAL)
def test_compiled_peers_are_right(name: str) -> None:
    torch.manual_seed(0)
    problem = AttentionProblem(Point(**SIZES, dtype="float32", **UNUSUAL[name]), "cpu")
    for peer in WEIGHTED_ATTENTION.peers(Settings()):
        if peer.is_compiled and not peer.unavailable:
            torch.compiler.reset()
            problem.verify(peer.build(problem), "forward", is_weighted=peer.is_weighted)


def test_attention_that_sees_later_keys_is_wrong() -> None:
    problem = AttentionProblem(Point(**SIZES, dtype="float32", is_causal=True), "cpu")
    arguments = *problem.leaves, problem.weights
    problem.verify(lambda: plain_attention(*arguments, is_causal=True), "forward")
    with pytest.raises(WrongResultError, match="output is off"):
        problem.verify(lambda: plain_attention(*arguments), "forward")


def test_costs_are_of_what_is_read_and_seen() -> None:
    one = Point(**SIZES, dtype="float32", queries=1)
    cost = attention_cost(one, "forward")
    assert cost.flops == 2 * 2 * 6 * 9 * 8
    assert cost.bytes == 4 * (2 * 6 * 8 + 2 * 6 * 9 * 8 + 3 * 9)
    causal = Point(**SIZES, dtype="float32", is_causal=True)
    everything = Point(**SIZES, dtype="float32")
    assert attention_cost(causal, "backward").flops == 5 * 2 * 6 * 45 * 8
    assert attention_cost(causal, "backward").bytes == attention_cost(everything, "backward").bytes
    more = Point(**SIZES, dtype="float32", queries=20, is_causal=True)
    assert more.pairs == 6 * (45 + 11 * 9)


def test_its_shapes() -> None:
    cases = short_cases(Settings(quick=True))
    assert {case.suite for case in cases} == {"short"}
    shapes = [case.shape for case in cases if case.dtype == "bfloat16"]
    usual = {(each["L"], each["B"] * each["H"]) for each in shapes if len(each) == 4}
    assert {heads for _, heads in usual} == {60, 300}
    assert {16, 256} <= {length for length, _ in usual} <= set(range(16, 257))
    assert {each["L"] for each in shapes if each.get("Lq") == 1} == {197, 257}
    assert {each["L"] for each in shapes if each.get("causal")} == {32, 77}
    assert len({case.title() for case in cases}) == len(cases)
    of_cuda = short_cases(Settings(device="cuda", quick=True))
    assert {case.dtype for case in of_cuda} == {"bfloat16"}


def test_filters_hold_for_all_of_its_shapes() -> None:
    options = {"dtypes": ("float32",), "directions": ("forward",)}
    cases = short_cases(Settings(lengths=(77,), **options))
    assert {case.shape["L"] for case in cases} == {77}
    assert any("causal" in case.shape for case in cases)
    assert {case.direction for case in cases} == {"forward"}
    cases = short_cases(Settings(heads=(24,), **options))
    assert {case.shape["B"] * case.shape["H"] for case in cases} == {24}


def flash_peer(**options: object) -> Peer:
    settings = Settings(**options)
    (found,) = (p for p in WEIGHTED_ATTENTION.peers(settings) if p.name == FLEX_FLASH)
    return found


def test_flex_attention_says_why_it_has_no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "for GPUs alone" in flash_peer().unavailable
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(flex, "_Backend", object, raising=False)
    assert "pip install --pre flash-attn-4" in flash_peer(device="cuda").unavailable
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert flash_peer(device="cuda").unavailable == ""
    assert "--no-compile" in flash_peer(device="cuda", compiles=False).unavailable
    monkeypatch.delattr(flex, "_Backend")
    assert "newer ones do" in flash_peer(device="cuda").unavailable
