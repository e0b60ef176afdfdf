"""Attention statistics: what keys receive and how queries spread, without the attention matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.backends.inputs import StatisticsInputs
from tir_kernels.backends.protocol import AttentionStatistics
from tir_kernels.operators.attending import sums_dtype
from tir_kernels.operators.checks import (
    check_attention_inputs,
    check_num_prefix_tokens,
    check_weights,
    require_bool,
    require_head_width,
    require_same_device,
)
from tir_kernels.operators.choose import choose_backend
from tir_kernels.operators.library import OPS, define, define_fake
from tir_kernels.operators.weighted_attention import cast_for_autocast


def attention_statistics(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None = None,
    *,
    num_prefix_tokens: int = 1,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionStatistics:
    """Attention received per key, and entropy and log-sum-exp per query, of each head.

    With ``s = scale q . k`` and ``A[i, j] = w[j] exp(s[i, j]) / sum_j w[j] exp(s[i, j])`` as in
    :func:`weighted_attention`:

    - ``received_from_prefix[j]``: the mean of ``A[i, j]`` over prefix queries i;
      ``received_from_patches[j]``: that over patch queries. A mean over no queries is 0, and a key
      of weight 0 receives exactly 0.
    - ``entropy[i] = -sum_j A[i, j] ln A[i, j]`` in nats, with ``0 ln 0 = 0``.
    - ``log_sum_exp[i] = ln sum_j w[j] exp(s[i, j])``.

    A query that attends to nothing, as where all weights of an image are 0, has a log-sum-exp of
    -inf and an entropy of 0, and adds 0 to what keys receive. The mean over all queries is
    ``(P * received_from_prefix + (Lq - P) * received_from_patches) / Lq``.

    Statistics have no gradient: no result requires one, whatever the arguments do.

    Args:
        q, k: (B, H, Lq, d) and (B, H, L, d) of one dtype, with unit stride in d and any other
            strides.
        weights: (B, L), finite; those below 0 act as 0. ``None``: 1.
        num_prefix_tokens: P of the queries, from 0 to Lq; class token and registers come first.
        is_causal: As for :func:`weighted_attention`.
        scale: ``None`` means ``d ** -0.5``.
        backend: "auto", or a name of :func:`available_backends`.

    Returns:
        ``AttentionStatistics(received_from_prefix, received_from_patches, entropy, log_sum_exp)``,
        (B, H, L) twice and (B, H, Lq) twice, in float32, or in float64 for float64 on the backend
        "reference". The other backends write no matrix of Lq x L.

    Raises:
        ValueError, TypeError: A wrong rank, shape, dtype, device or stride.
        RuntimeError: A backend that cannot run here.
    """
    q, k = cast_for_autocast(q, k)
    scale = check_attention_inputs(q, {"k": k}, scale, backend)
    require_head_width(q)
    num_prefix_tokens = check_num_prefix_tokens(num_prefix_tokens, q.shape[2], "queries Lq")
    require_bool("is_causal", is_causal)
    if weights is not None:
        check_weights(weights, k.shape[0], k.shape[2], "k")
        require_same_device("weights", weights, "q", q)
        weights = weights.detach().to(sums_dtype(q))
    inputs = StatisticsInputs(q.detach(), k.detach(), weights, scale, num_prefix_tokens, is_causal)
    return AttentionStatistics(*OPS.attention_statistics(*inputs, backend))


@define(
    "attention_statistics(Tensor query, Tensor key, Tensor? weights, float scale, "
    "int num_prefix_tokens, bool is_causal, str backend) -> (Tensor received_from_prefix, "
    "Tensor received_from_patches, Tensor entropy, Tensor log_sum_exp)"
)
def _attention_statistics(*arguments: Any) -> AttentionStatistics:
    *fields, name = arguments
    inputs = StatisticsInputs(*fields)
    query = inputs.query
    backend = choose_backend(
        name, "attention_statistics", query.device, query.dtype, query.shape[3]
    )
    if query.numel() == 0 or inputs.key.numel() == 0:
        statistics = _like_statistics(query, inputs.key)
        for each in statistics:
            each.zero_()
        statistics.log_sum_exp.fill_(-torch.inf)
        return statistics
    return backend.attention_statistics(inputs)


@define_fake("attention_statistics")
def _(query: Tensor, key: Tensor, *rest: Any) -> AttentionStatistics:
    return _like_statistics(query, key)


def _like_statistics(query: Tensor, key: Tensor) -> AttentionStatistics:
    """Statistics as yet unwritten."""
    return AttentionStatistics(
        *(
            query.new_empty(rows.shape[:3], dtype=sums_dtype(query))
            for rows in (key, key, query, query)
        )
    )
