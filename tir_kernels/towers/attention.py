"""Self-attention in the open: project, modifiers, attend, output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import weighted_attention
from tir_kernels.operators.choose import load_backend
from tir_kernels.towers.opening import NO_CHANGES, Changes, Opened
from tir_kernels.towers.protocol import AttentionCall


class AttentionRule:
    """A change of attention that is no weight of single keys; it stands in the place of those."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """(B, H, L, d), the attention under the rule."""
        raise NotImplementedError

    def matrix(self, call: AttentionCall) -> Tensor:
        """(B, H, L, L) float32, what each query makes of each value."""
        raise NotImplementedError

    def form(self) -> Tensor:
        """Refuse to be read as weights of keys, with a TypeError."""
        raise TypeError(
            f"attention is changed by {type(self).__name__}, which is no weight of its keys, so "
            "it can be neither measured nor weighted further; call remove() on that change first"
        )


def attend(call: AttentionCall) -> Tensor:
    """Softmax attention of a call, (B, H, L, d).

    Raises:
        ValueError: Key weights together with a mask.
    """
    query, key, value, scale, weights, mask, backend = call
    if weights is None:
        return _unweighted_attention(call)
    if mask is not None:
        raise ValueError("key weights cannot be combined with an attention mask")
    if isinstance(weights, Tensor):
        return weighted_attention(query, key, value, weights, scale=scale, backend=backend)
    return weights.attend(query, key, value, scale)


@torch.compiler.assume_constant_result
def _has_cpu_kernels() -> bool:
    return not load_backend("cpu").unavailable()


def is_faster_than_pytorch(tokens: Tensor) -> bool:
    """Whether plain attention is faster by ``weighted_attention`` than by PyTorch's own.

    It is on a CPU, by far in 16 bits. What is exported or traced keeps PyTorch's own, for programs
    that don't have this package.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    return tokens.device.type == "cpu" and tokens.dtype != torch.float64 and _has_cpu_kernels()


def _unweighted_attention(call: AttentionCall) -> Tensor:
    query, key, value, scale, _, mask, backend = call
    if mask is None and (backend != "auto" or is_faster_than_pytorch(query)):
        return weighted_attention(query, key, value, scale=scale, backend=backend)
    mask = None if mask is None else mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def attention_matrix(call: AttentionCall) -> Tensor:
    """The attention of each query to each key, (B, H, L, L) float32; rows sum to 1."""
    if isinstance(call.key_weights, AttentionRule):
        return call.key_weights.matrix(call)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = scale * call.query.float() @ call.key.float().mT
    if call.mask is not None:
        scores = scores + call.mask.float()
    weights = call.key_weights
    if weights is None:
        return scores.softmax(-1)
    weights = weights if isinstance(weights, Tensor) else weights.form()
    terms = weights.float().clamp(min=0)[:, None, None] * (scores - scores.amax(-1, True)).exp()
    sums = terms.sum(-1, keepdim=True)
    return terms / sums.where(sums > 0, 1.0)


def project_parts(
    owner: nn.Module, tokens: Tensor, packed: tuple[Tensor, Tensor | None], parts: slice
) -> Tensor:
    """Some of the equal parts of a packed projection, with the owner's low-rank change if any.

    Args:
        owner: The module on which LoRA is put.
        tokens: (B, L, D).
        packed: (3 K, D) weight and (3 K,) bias of query, key and value.
        parts: Which of the three, as a slice without step.

    Returns:
        (B, L, parts K).
    """
    weight, bias = packed
    low_rank: Any = getattr(owner, "low_rank", None)
    if low_rank is not None:
        return low_rank.project(tokens, weight, bias, parts.start, parts.stop - parts.start)
    width = len(weight) // 3
    rows = slice(parts.start * width, parts.stop * width)
    return F.linear(tokens, weight[rows], None if bias is None else bias[rows])


class OpenedAttention(Opened):
    """Self-attention of any library; a family says how it projects, and what follows."""

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        """(B, L, D) -> (B, H, L, d) each of some of query, key and value, ready to be compared."""
        raise NotImplementedError

    def output(self, attended: Tensor) -> Tensor:
        """(B, H, L, d) -> (B, L, D)."""
        raise NotImplementedError

    @property
    def _backend(self) -> str:
        """The backend that one of the adapters on this attention names; else "auto"."""
        named = (getattr(each, "backend", "auto") for each in self.tir_adapters)
        return next((name for name in named if name != "auto"), "auto")

    def call_of(
        self, tokens: Tensor, mask: Tensor | None = None, changes: Changes = NO_CHANGES
    ) -> AttentionCall:
        """The attention call of tokens (B, L, D), as adapters leave it.

        Args:
            tokens: (B, L, D), normalised as the block does it.
            mask: Added to the scores.
            changes: Of the pass under way, from the block.
        """
        query, key, value = self.project(tokens, slice(0, 3))
        return changes.of(AttentionCall(query, key, value, mask=mask, backend=self._backend))

    def first_tokens(self, tokens: Tensor, count: int) -> Tensor:
        """(B, L, D) -> (B, count, D): the output of the first tokens, which attend to all."""
        (query,) = self.project(tokens[:, :count], slice(0, 1))
        key, value = self.project(tokens, slice(1, 3))
        return self.output(F.scaled_dot_product_attention(query, key, value))


class OpenedLinear(Opened, nn.Linear):
    """A linear map with LoRA on it, for families whose projections are modules of their own."""

    plain = nn.Linear
    low_rank: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.low_rank.project(input, self.weight, self.bias)


def split_heads(projected: Tensor, num_heads: int, parts: slice) -> tuple[Tensor, ...]:
    """(B, L, parts H d) -> (B, H, L, d) for each of the parts, without a copy."""
    batch, length, width = projected.shape
    count = parts.stop - parts.start
    # Not one view of all: then their gradients would be stacked, and copied back in order.
    whole = (projected,) if count == 1 else projected.split(width // count, dim=2)
    return tuple(part.view(batch, length, num_heads, -1).transpose(1, 2) for part in whole)


def join_heads(attended: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H d)."""
    return attended.transpose(1, 2).flatten(2)
