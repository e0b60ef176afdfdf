"""The settings of a fine-tune: which values are taken, and which are refused."""

import json
from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest

from tir_kernels.fewshot import FewShotConfig


def test_numbers_of_other_libraries_are_numbers():
    config = FewShotConfig(
        steps=np.int64(3),
        seed=np.uint8(7),
        layers=np.array([1, 2]),
        text_layer=np.int32(1),
        strength=np.float32(0.25),
        top_ratio=Fraction(1, 4),
        lora_alpha=np.int64(8),
        logit_scale=np.float64(3),
    )
    assert config == FewShotConfig(
        steps=3,
        seed=7,
        layers=(1, 2),
        text_layer=1,
        strength=0.25,
        top_ratio=0.25,
        lora_alpha=8.0,
        logit_scale=3.0,
    )
    # They are written to a run's settings.
    assert json.loads(json.dumps(asdict(config)))["steps"] == 3


def test_whole_numbers_stay_as_they_were_written():
    assert json.dumps(FewShotConfig(lora_alpha=8).lora_alpha) == "8"


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("steps", 1.0, TypeError, "steps must be a whole number; got float"),
        ("steps", True, TypeError, "steps must be a whole number; got bool"),
        ("shots", "5", TypeError, "shots must be a whole number; got str"),
        ("lora_rank", 0, ValueError, "lora_rank must be at least 1; got 0"),
        ("context_tokens", 10**9, ValueError, "context_tokens must be at most 1024, since no text"),
        ("seed", -1, ValueError, "seed must be at least 0; got -1"),
        ("seed", 2**63, ValueError, "seed must be at most 9223372036854775807, since"),
        ("layers", 3, TypeError, "layers must be a list of whole numbers; got 3"),
        ("layers", (1.5,), TypeError, "layers must be a list of whole numbers; got float"),
        ("lora_lr", "1e-3", TypeError, "lora_lr must be a number; got str"),
        ("lora_lr", float("nan"), ValueError, "lora_lr must be a finite number"),
        ("strength", 1j, TypeError, "strength must be a number; got complex"),
        ("logit_scale", float("inf"), ValueError, "logit_scale must be finite"),
    ],
)
def test_other_values_are_refused(field, value, error, message):
    with pytest.raises(error, match=message):
        FewShotConfig(**{field: value})
