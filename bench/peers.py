"""The implementations that compete: ours through the public functions, and PyTorch's."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

import tir_kernels

from .formulas import (
    causal_bias,
    key_bias,
    masked_sdpa,
    plain_attention,
    plain_token_weights,
    tome_attention,
)
from .problems import AttentionProblem, Forward, Problem, ReweightedProblem
from .settings import DIRECTIONS, OURS, Settings

EAGER = "eager"
COMPILED = "torch.compile"
COMPILED_SDPA = f"{COMPILED} sdpa+mask"
MASKED = "sdpa+mask"
UNWEIGHTED = "sdpa unweighted"
FLEX = "flex_attention"
FLEX_FLASH = f"{FLEX} flash"
TOME = "ToMe"

_SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Peer:
    """One way to compute an operator.

    Args:
        name: As in the records.
        build: Problem -> the forward pass as a function without arguments.
        unavailable: Why it cannot take part, if that is known.
        directions: What it can do.
        is_weighted: Whether it computes the weighted function, or the one without weights, which
            shows the price of weights.
        is_compiled: Whether it is compiled for each shape it meets.
        score_tensors: How many (B, H, L, L) tensors of float32 a forward pass holds, roughly.
    """

    name: str
    build: Callable[[Any], Forward]
    unavailable: str = ""
    directions: tuple[str, ...] = DIRECTIONS
    is_weighted: bool = True
    is_compiled: bool = False
    score_tensors: int = 0


def peers_of(
    function: Callable[..., Any], formula: Callable[..., Any], *, has_scores: bool = False
) -> Callable[[Settings], list[Peer]]:
    """Our backends of a function, and a formula of the problem's arguments, as it is and compiled.

    Args:
        function: Public, of the problem's options.
        formula: Of the problem's arguments.
        has_scores: Whether the formula holds attention's scores in memory.
    """
    scores = 3 if has_scores else 0

    def eager(problem: Problem) -> Forward:
        return functools.partial(formula, *problem.arguments)

    def compiled(problem: Problem) -> Forward:
        return functools.partial(_compiled(formula), *problem.arguments)

    def peers(settings: Settings) -> list[Peer]:
        reason = settings.why_not_compiled
        return [
            *_own_peers(function, settings, has_scores=has_scores),
            Peer(EAGER, eager, score_tensors=scores),
            Peer(COMPILED, compiled, reason, is_compiled=True, score_tensors=scores),
        ]

    return peers


def attention_peers(settings: Settings) -> list[Peer]:
    """Our backends, and every way PyTorch has, on the device of the settings."""
    # On a CPU PyTorch has one fused attention, which it picks itself. To name a backend takes time
    # of the host, which only there is part of what is measured.
    backends = ("", "math") if settings.device == "cpu" else tuple(_SDPA_BACKENDS)
    plain = peers_of(tir_kernels.weighted_attention, plain_attention, has_scores=True)
    return [
        *plain(settings),
        Peer(TOME, _tome, score_tensors=3),
        *(sdpa_peer(MASKED, name) for name in backends),
        *(sdpa_peer(UNWEIGHTED, name) for name in backends if name != "math"),
        _flex_peer(settings),
        Peer(FLEX_FLASH, _flex_flash, _why_no_flash(settings), is_compiled=True),
    ]


def whole_peers(settings: Settings) -> list[Peer]:
    """From tokens and classes to the attention's output."""

    def eager(problem: ReweightedProblem) -> Forward:
        return _whole(plain_attention, problem, lambda function: function)

    def compiled_sdpa(problem: ReweightedProblem) -> Forward:
        return _whole(masked_sdpa, problem, _compiled)

    return [
        *_own_peers(tir_kernels.reweighted_attention, settings, has_scores=True),
        Peer(EAGER, eager, score_tensors=3),
        Peer(COMPILED_SDPA, compiled_sdpa, settings.why_not_compiled, is_compiled=True),
    ]


def _own_peers(function: Callable[..., Any], settings: Settings, *, has_scores: bool) -> list[Peer]:
    """Every backend of ours; only the reference holds scores in memory."""

    def peer(name: str, reason: str) -> Peer:
        def build(problem: Problem) -> Forward:
            return functools.partial(function, **problem.options, backend=name)

        scores = 4 if has_scores and name == "reference" else 0
        return Peer(OURS + name, build, reason, score_tensors=scores)

    return [peer(name, reason) for name, reason in settings.our_backends()]


def _whole(
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


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for exactly the shapes it meets, as a whole."""
    # Backward passes are timed over and over on the graph of one forward pass, which is refused
    # where the compiled backward pass may overwrite what was saved for it.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


def sdpa_peer(kind: str, backend: str = "") -> Peer:
    """PyTorch's fused attention, masked or unweighted; it chooses a backend if none is named."""

    def build(problem: AttentionProblem) -> Forward:
        # The mask is given ready made, in the type it asks for.
        mask = key_bias(problem.weights) if kind == MASKED else None
        is_causal = problem.is_causal and mask is None
        if mask is not None:
            hidden = causal_bias(*problem.leaves[:2]) if problem.is_causal else 0.0
            mask = (mask + hidden).to(problem.dtype)
        forward = functools.partial(
            F.scaled_dot_product_attention, *problem.leaves, attn_mask=mask, is_causal=is_causal
        )
        # The context manager is a decorator too, which enters it anew at each call.
        return sdpa_kernel(_SDPA_BACKENDS[backend])(forward) if backend else forward

    name, scores = f"{kind} {backend}".strip(), 3 if backend == "math" else 0
    return Peer(name, build, is_weighted=kind == MASKED, score_tensors=scores)


def _flex_peer(settings: Settings) -> Peer:
    reason = settings.why_not_compiled
    if not reason and settings.quick and settings.device == "cpu":
        reason = "left out by --quick: compiling it takes longer than the rest of the suite"
    # PyTorch compiles its backward pass for GPUs only.
    directions = ("forward",) if settings.device == "cpu" else DIRECTIONS
    return Peer(FLEX, _flex, reason, directions, is_compiled=True)


def _why_no_flash(settings: Settings) -> str:
    if settings.device == "cpu":
        return "its kernels are FlashAttention's, which are for GPUs alone"
    from torch.nn.attention import flex_attention as flex

    if not hasattr(flex, "_Backend"):
        return "FlexAttention of this version of PyTorch has no choice of a BACKEND; newer ones do"
    with contextlib.suppress(ImportError):
        if importlib.util.find_spec("flash_attn.cute") is not None:
            return settings.why_not_compiled
    return "it needs FlashAttention's CuTe kernels: pip install --pre flash-attn-4"


def _tome(problem: AttentionProblem) -> Forward:
    return functools.partial(tome_attention, *problem.arguments)


def _flex_flash(problem: AttentionProblem) -> Forward:
    return _flex(problem, {"BACKEND": "FLASH"})


def _flex(problem: AttentionProblem, kernel_options: dict[str, Any] | None = None) -> Forward:

    from torch.nn.attention import flex_attention as flex

    log_weights = problem.weights.log()

    def add_log_weight(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + log_weights[b, j]

    leaves = problem.leaves
    if log_weights.device.type == "cpu":  # where it refuses what requires gradients
        leaves = tuple(leaf.detach() for leaf in leaves)
    block_mask = None
    if problem.is_causal:
        sizes = leaves[0].shape[2], leaves[1].shape[2]
        block_mask = flex.create_block_mask(
            lambda b, h, i, j: i >= j, None, None, *sizes, device=log_weights.device.type
        )
    return functools.partial(
        _compiled(flex.flex_attention),
        *leaves,
        score_mod=add_log_weight,
        block_mask=block_mask,
        kernel_options=kernel_options,
    )
