"""Relevance and token weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.problems import Forward, RelevanceProblem
from bench.settings import Settings
from bench.shapes import PREFIX_TOKENS
from tir_kernels import token_relevance, token_weights

from .common import COMPILED, EAGER, Peer, compiled, own_peers

Norm = tuple[Tensor, Tensor, float]  # gain, offset, eps


def relevance_peers(settings: Settings) -> list[Peer]:
    def ours(backend: str, problem: RelevanceProblem) -> Forward:
        return functools.partial(token_relevance, **_options(problem), backend=backend)

    return [
        *own_peers(settings, ours),
        *_plain_peers(plain_relevance, relevance_arguments, settings),
    ]


def token_weights_peers(settings: Settings) -> list[Peer]:
    def ours(backend: str, problem: RelevanceProblem) -> Forward:
        options = _options(problem)
        return lambda: token_weights(**options, rule=problem.rule, backend=backend).weights

    return [
        *own_peers(settings, ours),
        *_plain_peers(plain_token_weights, token_weights_arguments, settings),
    ]


def _options(problem: RelevanceProblem) -> dict[str, Any]:
    """The arguments that both of our operators take."""
    return {
        "tokens": problem.tokens,
        "class_embeddings": problem.classes,
        "joint_space": problem.space,
        "num_prefix_tokens": PREFIX_TOKENS,
    }


def plain_relevance(tokens: Tensor, classes: Tensor, norm: Norm, proj: Tensor) -> Tensor:
    """(B, C, N) cosines, every step in the type of the tokens."""
    gain, offset, eps = norm
    features = F.layer_norm(tokens[:, PREFIX_TOKENS:], gain.shape, gain, offset, eps) @ proj
    return F.normalize(classes, dim=-1) @ F.normalize(features, dim=-1).mT


def plain_token_weights(
    tokens: Tensor,
    classes: Tensor,
    norm: Norm,
    proj: Tensor,
    top_k: int,
    strength: float,
    center: float,
) -> Tensor:
    """(B, L) weights of the linear rule."""
    relevance = plain_relevance(tokens, classes, norm, proj)
    chosen = relevance.topk(top_k, dim=-1).indices
    counts = torch.zeros_like(relevance, dtype=torch.float32).scatter_(-1, chosen, 1.0).sum(1)
    weights = torch.where(counts == 0, 1.0, 1.0 - strength * (counts - center))
    return F.pad(weights, (PREFIX_TOKENS, 0), value=1.0)


def relevance_arguments(problem: RelevanceProblem) -> tuple:
    """The arguments for :func:`plain_relevance`."""
    norm = (problem.gain, problem.offset, problem.space.norm_eps)
    return problem.tokens, problem.classes, norm, problem.proj


def token_weights_arguments(problem: RelevanceProblem) -> tuple:
    """The arguments for :func:`plain_token_weights`."""
    rule = problem.rule
    return *relevance_arguments(problem), problem.top_k, rule.strength, rule.center


def _plain_peers(function: Callable, arguments: Callable, settings: Settings) -> list[Peer]:
    def eager(problem: RelevanceProblem) -> Forward:
        return functools.partial(function, *arguments(problem))

    def compiled_whole(problem: RelevanceProblem) -> Forward:
        return functools.partial(compiled(function), *arguments(problem))

    return [
        Peer(EAGER, eager),
        Peer(COMPILED, compiled_whole, settings.why_not_compiled, is_compiled=True),
    ]
