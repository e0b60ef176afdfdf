"""Attention in numbers per key and per query, from an attention call."""

from __future__ import annotations

from torch import Tensor

from tir_kernels import AttentionStatistics, attention_statistics
from tir_kernels.towers.protocol import AttentionCall


def statistics_of(call: AttentionCall, num_prefix_tokens: int) -> AttentionStatistics:
    """The statistics of a call whose key weights, if any, are a tensor, all in float32.

    L x L memory is used only where the call has a mask, which the operator does not take.
    """
    if call.mask is not None:
        return _masked_statistics(call, call.mask, num_prefix_tokens)
    weights: Tensor | None = call.key_weights  # type: ignore[assignment]
    found = attention_statistics(
        call.query,
        call.key,
        weights,
        num_prefix_tokens=num_prefix_tokens,
        is_causal=call.is_causal,
        scale=call.scale,
        backend=call.backend,
    )
    return AttentionStatistics(*(each.float() for each in found))


def _masked_statistics(
    call: AttentionCall, mask: Tensor, num_prefix_tokens: int
) -> AttentionStatistics:
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = scale * call.query.float() @ call.key.float().mT + mask.float()
    matrix = scores.softmax(-1)
    prefix, patches = matrix[:, :, :num_prefix_tokens], matrix[:, :, num_prefix_tokens:]
    return AttentionStatistics(
        prefix.sum(2) / max(prefix.shape[2], 1),
        patches.sum(2) / max(patches.shape[2], 1),
        -matrix.xlogy(matrix).sum(3),
        scores.logsumexp(3),
    )
