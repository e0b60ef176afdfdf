"""Options that methods on frozen features share."""

from __future__ import annotations

from typing import Any

from tir_kernels.fewshot import fields

LOGIT_SCALE_HELP = "Factor of the cosine in the logits."


def steps(default: int) -> Any:
    """The field of training steps; without any, a method is what its parameters start as."""
    return fields.whole(
        default,
        "Full-batch training steps per episode.",
        least=0,
        most=10**6,
        reason="no few-shot training takes as many",
    )


def rate(default: float) -> Any:
    """The field of the optimizer's learning rate."""
    return fields.real(default, "Learning rate of what is trained on frozen features.", least=0)


def share(name: str, value: float) -> None:
    """Check that a number is at most 1.

    Raises:
        ValueError: It is more.
    """
    if value > 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}")
