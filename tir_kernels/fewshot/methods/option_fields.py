"""Options that several methods have."""

from __future__ import annotations

from typing import Any

from tir_kernels.fewshot import fields

LOGIT_SCALE_HELP = "Factor of the cosine in the logits."


def steps(default: int, least: int = 0) -> Any:
    """The field of training steps; without any, a method is what its parameters start as."""
    return fields.whole(
        default,
        "Full-batch training steps per episode.",
        least=least,
        most=10**6,
        reason="no few-shot training takes as many",
    )


def context_tokens(default: int, help: str, least: int = 1) -> Any:
    """The field of the vectors of a learned prompt context."""
    return fields.whole(
        default, help, least=least, most=1024, reason="no text tower has as many positions"
    )


def context_rate(trained: str) -> Any:
    """The field of the learning rate of what is trained as CoOp trains its context."""
    return fields.real(
        2e-3, f"SGD's learning rate for {trained} (momentum 0.9, weight decay 5e-4).", least=0
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
