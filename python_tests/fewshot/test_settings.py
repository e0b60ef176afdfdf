"""The settings of methods, protocol and runtime: which values are taken, and which are refused."""

import json
from dataclasses import asdict, fields
from fractions import Fraction

import numpy as np
import pytest

from tir_kernels.fewshot import Arm, Protocol, Runtime
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.methods import METHODS, method_class
from tir_kernels.fewshot.methods.families import FAMILIES
from tir_kernels.fewshot.methods.lora import LoRA
from tir_kernels.fewshot.methods.tir import TIR
from tir_kernels.fewshot.methods.zero_shot import ZeroShot
from tir_kernels.fewshot.run_options import Inputs, Reading


def test_numbers_of_other_libraries_are_numbers():
    method = TIR(
        steps=np.int64(3),
        layers=np.array([1, 2]),
        text_layer=np.int32(1),
        strength=np.float32(0.25),
        top_ratio=Fraction(1, 4),
        lora_alpha=np.int64(8),
        logit_scale=np.float64(3),
    )
    assert method == TIR(
        steps=3,
        layers=(1, 2),
        text_layer=1,
        strength=0.25,
        top_ratio=0.25,
        lora_alpha=8.0,
        logit_scale=3.0,
    )
    # They are written to a run's settings.
    assert json.loads(json.dumps(asdict(method)))["steps"] == 3
    assert Protocol(seed=np.uint8(7)).seed == 7


def test_whole_numbers_stay_as_they_were_written():
    assert json.dumps(LoRA(lora_alpha=8).lora_alpha) == "8"


@pytest.mark.parametrize(
    ("settings", "field", "value", "error", "message"),
    [
        (TIR, "steps", 1.0, TypeError, "steps must be a whole number; got float"),
        (TIR, "steps", True, TypeError, "steps must be a whole number; got bool"),
        (TIR, "steps", None, TypeError, "steps must be a whole number; got NoneType"),
        (TIR, "lora_rank", 0, ValueError, "lora_rank must be at least 1; got 0"),
        (TIR, "context_tokens", 10**9, ValueError, "must be at most 1024, since no text"),
        (TIR, "layers", 3, TypeError, "layers must be a list of whole numbers; got 3"),
        (TIR, "layers", (1.5,), TypeError, "layers must be a list of whole numbers; got float"),
        (TIR, "lora_lr", "1e-3", TypeError, "lora_lr must be a number; got str"),
        (TIR, "lora_lr", float("nan"), ValueError, "lora_lr must be a finite number"),
        (TIR, "lora_dropout", 1, ValueError, r"lora_dropout must lie in \[0, 1\); got 1"),
        (TIR, "strength", 1j, TypeError, "strength must be a number; got complex"),
        (TIR, "top_ratio", 1.5, ValueError, "top_ratio must"),
        (TIR, "rule", "cubic", ValueError, "rule must be one of linear, "),
        (TIR, "placement", "heads", ValueError, "placement must be one of tokens, attention, both"),
        (ZeroShot, "logit_scale", float("inf"), ValueError, "logit_scale must be finite"),
        (Protocol, "shots", "5", TypeError, "shots must be a whole number; got str"),
        (Protocol, "ways", 1, ValueError, "ways must be at least 2; got 1"),
        (Protocol, "seed", -1, ValueError, "seed must be at least 0; got -1"),
        (Protocol, "seed", 2**63, ValueError, "must be at most 9223372036854775807, since"),
        (Runtime, "precision", "float8", ValueError, "precision must be one of float32, bfloat16"),
        (Runtime, "backend", "abacus", ValueError, "backend must be .*auto"),
        (Runtime, "backend", 3, TypeError, "backend must be a str; got int"),
        (Runtime, "checkpoint", 1, TypeError, "checkpoint must be a bool; got int"),
        (Runtime, "parallel", 0, ValueError, "parallel must be at least 1; got 0"),
    ],
)
def test_other_values_are_refused(settings, field, value, error, message):
    with pytest.raises(error, match=message):
        settings(**{field: value})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself(name):
    method = method_class(name)
    assert method.name == name
    assert method.source
    assert FAMILIES[method.family].label in "FTIS"  # none that runs here sees the queries together
    assert set(method.shown_fields) <= {field.name for field in fields(method)}
    taken = {field.name for kind in (Protocol, Runtime, Inputs, Reading) for field in fields(kind)}
    assert not taken & {field.name for field in fields(method)}
    for field in fields(method):
        assert field.metadata["help"].endswith("."), field.name
        # One option serves all methods that have it.
        for other in METHODS:
            for theirs in fields(method_class(other)):
                assert (
                    theirs.name != field.name
                    or theirs.type.split(" | ")[0] == (field.type.split(" | ")[0])
                )


def test_arms():
    arms = make_arms(
        ["tir", "zero-shot", "tir"],
        ["tir@late=tir,layers=8,10,placement=attention", "cold = lora, lora-lr=0, steps=7"],
        {"steps": 3, "top_ratio": 0.5},
    )
    assert arms == (
        Arm("tir", TIR(steps=3, top_ratio=0.5)),
        Arm("zero-shot", ZeroShot()),
        Arm("tir@late", TIR(steps=3, top_ratio=0.5, layers=(8, 10), placement="attention")),
        Arm("cold", LoRA(steps=7, lora_lr=0)),
    )
    assert Arm.of("lora", steps=2) == Arm("lora", LoRA(steps=2))


@pytest.mark.parametrize(
    ("arms", "shared", "message"),
    [
        (["late"], {}, "arm must look like NAME=METHOD,field=value; got 'late'"),
        (["=tir"], {}, "arm must look like"),
        (["a=magic"], {}, "arm 'a': method must be one of tir, lora, .*; got 'magic'"),
        (["a=lora,top_ratio=1"], {}, "arm 'a': lora has no 'top_ratio'; it has steps, lora_rank"),
        (["a=tir,8"], {}, "arm 'a': '8' is no field=value"),
        (["a=tir,steps=many"], {}, "arm 'a': steps can't be 'many'"),
        (["a=tir,layers=8,x"], {}, "arm 'a': layers can't be '8,x'"),
        (["a=tir,steps=0"], {}, "arm 'a': steps must be at least 1; got 0"),
        (["lora=tir"], {}, "names of their own; 'lora' is there twice"),
        ([], {"top_ratio": 0.5}, "top_ratio is no setting of lora; leave it out"),
    ],
)
def test_other_arms_are_refused(arms, shared, message):
    with pytest.raises(ValueError, match=message):
        make_arms(["lora"], arms, shared)
