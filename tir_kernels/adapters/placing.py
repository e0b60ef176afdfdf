"""Where weights of the tokens act in a block."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tir_kernels import reweight_tokens
from tir_kernels.towers.attention import AttentionRule
from tir_kernels.towers.protocol import AttentionCall, Modifier


def placed(
    hidden: Tensor, weights: Tensor, placement: str, backend: str
) -> tuple[Tensor, Modifier | None]:
    """What enters a block under weights, and what they change in its attention.

    Args:
        hidden: (B, L, D), what enters without them.
        weights: (B, L) float32.
        placement: One of ``tir_kernels.rules.PLACEMENTS``.
        backend: Backend of the attention, where weights act in it.
    """
    if placement == "attention":
        return hidden, partial(_weigh_keys, weights, backend)
    if placement == "values":
        return hidden, partial(_weigh_values, weights, backend)
    modifier = partial(_weigh_keys, weights, backend) if placement == "both" else None
    return reweight_tokens(hidden, weights), modifier


def _weigh_keys(
    weights: Tensor, backend: str, call: AttentionCall, hidden: Tensor
) -> AttentionCall:
    if isinstance(call.key_weights, AttentionRule):
        call.key_weights.form()  # refuses
    return call._replace(key_weights=weights, backend=backend)


def _weigh_values(
    weights: Tensor, backend: str, call: AttentionCall, hidden: Tensor
) -> AttentionCall:
    value = (call.value * weights[:, None, :, None]).to(call.value.dtype)
    return call._replace(value=value, backend=backend)
