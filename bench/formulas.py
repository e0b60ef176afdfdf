"""What is measured, as plain PyTorch writes it: peers in a type, and in float64 what is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import PREFIX_TOKENS

Norm = tuple[Tensor, Tensor, float]  # gain, offset, eps


def materialised_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as the formula is written; ``bias`` is added to the scores."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(-1).to(v.dtype) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's fused attention."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if bias is None else bias.to(q.dtype)
    )


def key_bias(weights: Tensor) -> Tensor:
    """Weights of keys (B, L) as what is added to scores (B, H, L, L)."""
    return weights.clamp(min=0).log()[:, None, None, :]


def causal_bias(query: Tensor, key: Tensor) -> Tensor:
    """(Lq, L) float32, -inf for keys behind a query's place."""
    shape = query.shape[2], key.shape[2]
    return torch.full(shape, -torch.inf, device=query.device).triu(1)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, is_causal: bool = False
) -> Tensor:
    bias = key_bias(weights)
    bias = bias + causal_bias(query, key) if is_causal else bias
    return materialised_attention(query, key, value, bias)


def tome_attention(
    query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, is_causal: bool = False
) -> Tensor:
    """ToMe's proportional attention as its program has it; tokens stand for ``sizes`` of them."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    scores = scores + sizes.log()[:, None, None].to(scores.dtype)
    if is_causal:
        scores = scores + causal_bias(query, key).to(scores.dtype)
    return scores.softmax(dim=-1) @ value


def masked_sdpa(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> Tensor:
    return fused_attention(query, key, value, key_bias(weights))


def plain_statistics(query: Tensor, key: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """What keys receive from prefix tokens and from patches, entropy and log-sum-exp of rows."""
    scores = query @ key.mT * query.shape[-1] ** -0.5 + key_bias(weights).to(query.dtype)
    attention = scores.softmax(-1)
    return (
        attention[:, :, :PREFIX_TOKENS].mean(2),
        attention[:, :, PREFIX_TOKENS:].mean(2),
        torch.special.entr(attention).sum(-1),
        scores.logsumexp(-1),
    )


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
