"""Attention with a weight per key and its statistics, and PyTorch's without, for its price."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.formulas import key_bias, plain_attention, plain_statistics
from bench.problems import AttentionProblem, Forward, StatisticsProblem
from bench.settings import DIRECTIONS, Settings
from bench.shapes import PREFIX_TOKENS
from tir_kernels import attention_statistics, weighted_attention

from . import Peer, compiled, own_peers, plain_peers

MASKED = "sdpa+mask"
UNWEIGHTED = "sdpa unweighted"
FLEX = "flex_attention"

_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention_peers(settings: Settings) -> list[Peer]:
    """Our backends, and every way PyTorch has, on the device of the settings."""

    def ours(backend: str, problem: AttentionProblem) -> Forward:
        return functools.partial(weighted_attention, *problem.arguments, backend=backend)

    return [
        *own_peers(settings, ours, reference_scores=4),
        *plain_peers(plain_attention, settings, score_tensors=3),
        *_sdpa_peers(settings.device),
        _flex_peer(settings),
    ]


def statistics_peers(settings: Settings) -> list[Peer]:
    """Our backends, and the materialised formulas as they are and compiled."""

    def ours(backend: str, problem: StatisticsProblem) -> Forward:
        options = {"num_prefix_tokens": PREFIX_TOKENS, "backend": backend}
        return functools.partial(attention_statistics, *problem.arguments, **options)

    return [
        *own_peers(settings, ours, reference_scores=4),
        *plain_peers(plain_statistics, settings, score_tensors=3),
    ]


def default_sdpa() -> Peer:
    """PyTorch's attention with a mask, whose backend PyTorch chooses."""
    return _sdpa_peer(MASKED, "", True)


def _sdpa_peers(device: str) -> list[Peer]:
    # On a CPU PyTorch has one fused attention, which it picks itself. To name a backend takes time
    # of the host, which only there is part of what is measured.
    backends = ("", "math") if device == "cpu" else tuple(_SDPA_BACKENDS)
    masked = [_sdpa_peer(MASKED, name, True) for name in backends]
    return masked + [_sdpa_peer(UNWEIGHTED, name, False) for name in backends if name != "math"]


def _sdpa_peer(prefix: str, backend: str, is_masked: bool) -> Peer:
    return Peer(
        f"{prefix} {backend}".strip(),
        functools.partial(_sdpa, backend, is_masked),
        is_weighted=is_masked,
        score_tensors=3 if backend == "math" else 0,
    )


def _sdpa(backend: str, is_masked: bool, problem: AttentionProblem) -> Forward:
    """PyTorch's fused attention; its mask is given ready made, in the type it asks for."""
    mask = key_bias(problem.weights).to(problem.dtype) if is_masked else None
    forward = functools.partial(F.scaled_dot_product_attention, *problem.leaves, attn_mask=mask)
    # The context manager is a decorator too, which enters it anew at each call.
    return sdpa_kernel(_SDPA_BACKENDS[backend])(forward) if backend else forward


def _flex_peer(settings: Settings) -> Peer:
    reason = settings.why_not_compiled
    if not reason and settings.quick and settings.device == "cpu":
        reason = "left out by --quick: compiling it takes longer than the rest of the suite"
    # PyTorch compiles its backward pass for GPUs only.
    directions = ("forward",) if settings.device == "cpu" else DIRECTIONS
    return Peer(FLEX, _flex, reason, directions, is_compiled=True)


def _flex(problem: AttentionProblem) -> Forward:
    from torch.nn.attention.flex_attention import flex_attention

    log_weights = problem.weights.log()

    def add_log_weight(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log_weights[b, j]

    leaves = problem.leaves
    if log_weights.device.type == "cpu":  # where it refuses what requires gradients
        leaves = tuple(leaf.detach() for leaf in leaves)
    return functools.partial(compiled(flex_attention), *leaves, score_mod=add_log_weight)
