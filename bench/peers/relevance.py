"""Relevance, token weights, and the re-weighted attention as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.formulas import masked_sdpa, plain_attention, plain_relevance, plain_token_weights
from bench.problems import Forward, RelevanceProblem, ReweightedProblem
from bench.settings import Settings
from bench.shapes import PREFIX_TOKENS
from tir_kernels import reweighted_attention, token_relevance, token_weights

from . import COMPILED, EAGER, Peer, compiled, own_peers, plain_peers

COMPILED_SDPA = f"{COMPILED} sdpa+mask"


def relevance_peers(settings: Settings) -> list[Peer]:
    def ours(backend: str, problem: RelevanceProblem) -> Forward:
        return functools.partial(token_relevance, **_options(problem, backend))

    return [*own_peers(settings, ours), *plain_peers(plain_relevance, settings)]


def token_weights_peers(settings: Settings) -> list[Peer]:
    def ours(backend: str, problem: RelevanceProblem) -> Forward:
        options = _options(problem, backend)
        return lambda: token_weights(**options, rule=problem.rule).weights

    return [*own_peers(settings, ours), *plain_peers(plain_token_weights, settings)]


def whole_peers(settings: Settings) -> list[Peer]:
    """From tokens and classes to the attention's output."""

    def ours(backend: str, problem: ReweightedProblem) -> Forward:
        options = _options(problem.relevance, backend) | {"rule": problem.relevance.rule}
        return functools.partial(reweighted_attention, *problem.leaves, **options)

    def eager(problem: ReweightedProblem) -> Forward:
        return _plain(plain_attention, problem, lambda function: function)

    def compiled_sdpa(problem: ReweightedProblem) -> Forward:
        return _plain(masked_sdpa, problem, compiled)

    return [
        *own_peers(settings, ours, reference_scores=4),
        Peer(EAGER, eager, score_tensors=3),
        Peer(COMPILED_SDPA, compiled_sdpa, settings.why_not_compiled, is_compiled=True),
    ]


def _options(problem: RelevanceProblem, backend: str) -> dict[str, Any]:
    """The arguments that all our operators take."""
    return {
        "tokens": problem.tokens,
        "class_embeddings": problem.classes,
        "joint_space": problem.space,
        "num_prefix_tokens": PREFIX_TOKENS,
        "backend": backend,
    }


def _plain(
    attend: Callable[..., Tensor],
    problem: ReweightedProblem,
    transform: Callable[[Callable], Callable],
) -> Forward:
    def whole(leaves: tuple, relevance_inputs: tuple) -> tuple[Tensor, Tensor]:
        weights = plain_token_weights(*relevance_inputs)
        return attend(*leaves, weights), weights

    run = functools.partial(transform(whole), problem.leaves, problem.relevance.arguments)

    def forward(return_weights: bool = False) -> Any:
        output, weights = run()
        return (output, (weights,)) if return_weights else output

    return forward
