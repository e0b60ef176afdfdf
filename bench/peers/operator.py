"""Re-weighted attention as a whole: from tokens and classes to the attention's output."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from bench.problems import ReweightedProblem, WholeForward
from bench.settings import Settings
from bench.shapes import PREFIX_TOKENS
from tir_kernels import reweighted_attention

from .attention import plain_attention
from .common import COMPILED, EAGER, Peer, compiled, own_peers
from .relevance import plain_token_weights, token_weights_arguments

COMPILED_SDPA = f"{COMPILED} sdpa+mask"


def operator_peers(settings: Settings) -> list[Peer]:
    return [
        *own_peers(settings, _ours, reference_scores=4),
        Peer(EAGER, functools.partial(_plain, plain_attention), score_tensors=3),
        Peer(COMPILED_SDPA, _compiled_sdpa, settings.why_not_compiled, is_compiled=True),
    ]


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float) -> Tensor:
    mask = weights.clamp(min=0).log()[:, None, None, :].to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _ours(backend: str, problem: ReweightedProblem) -> WholeForward:
    attention, relevance = problem.attention, problem.relevance
    call = functools.partial(
        reweighted_attention,
        *attention.leaves,
        relevance.tokens,
        relevance.classes,
        joint_space=relevance.space,
        rule=relevance.rule,
        num_prefix_tokens=PREFIX_TOKENS,
        scale=attention.scale,
        backend=backend,
    )

    def with_weights() -> tuple[Tensor, Tensor]:
        output, found = call(return_weights=True)
        return output, found.weights

    return WholeForward(call, with_weights)


def _plain(
    attend: Callable[..., Tensor],
    problem: ReweightedProblem,
    transform: Callable[[Callable], Callable] = lambda function: function,
) -> WholeForward:
    def whole(leaves: tuple, scale: float, relevance_inputs: tuple) -> tuple[Tensor, Tensor]:
        weights = plain_token_weights(*relevance_inputs)
        return attend(*leaves, weights, scale), weights

    attention = problem.attention
    run = functools.partial(
        transform(whole),
        attention.leaves,
        attention.scale,
        token_weights_arguments(problem.relevance),
    )
    return WholeForward(lambda: run()[0], run)


def _compiled_sdpa(problem: ReweightedProblem) -> WholeForward:
    return _plain(masked_sdpa, problem, compiled)
