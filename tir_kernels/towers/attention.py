"""Self-attention in the open: project, modifiers, attend, output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import weighted_attention
from tir_kernels.operators.attending import lie_packed
from tir_kernels.operators.choose import load_backend
from tir_kernels.operators.library import is_transformed
from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.opening import NO_CHANGES, Changes, Opened
from tir_kernels.towers.products import linear
from tir_kernels.towers.protocol import AttentionCall


class AttentionRule:
    """A change of attention that is no weight of single keys; it stands in the place of those."""

    def attend(self, call: AttentionCall) -> Tensor:
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
    """Softmax attention of a call, (B, H, Lq, d).

    Raises:
        ValueError: Key weights together with a mask.
    """
    if call.key_weights is None:
        return _unweighted_attention(call)
    if call.mask is not None:
        raise ValueError("key weights cannot be combined with an attention mask")
    if isinstance(call.key_weights, Tensor):
        return _own_attention(call, call.key_weights)
    return call.key_weights.attend(call)


def _own_attention(call: AttentionCall, weights: Tensor | None) -> Tensor:
    return weighted_attention(
        call.query,
        call.key,
        call.value,
        weights,
        is_causal=call.is_causal,
        scale=call.scale,
        backend=call.backend,
    )


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
    query, key, value, scale, _, mask, _, is_causal = call
    if mask is None and _is_own(call):
        return _own_attention(call, None)
    mask = None if mask is None else mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale
    )


def _is_own(call: AttentionCall) -> bool:
    """Whether a call without a mask goes to this package's attention."""
    return call.backend != "auto" or is_faster_than_pytorch(call.query)


def under_mask(
    call: AttentionCall, mask: Tensor | KnownMask | None, has_changes: bool
) -> AttentionCall:
    """The call under a mask, of which it takes no more than it needs.

    Keys that are hidden from all queries are keys of weight 0 where this package's attention serves
    the call, and nothing else is to weigh them.

    Args:
        call: Without a mask or key weights.
        mask: Added to the scores, (L, L) or (B, H, L, L), or known to a text tower.
        has_changes: Whether modifiers are yet to come.
    """
    if not isinstance(mask, KnownMask):
        return call._replace(mask=mask)
    if mask.keys is None or (_is_own(call) and not has_changes):
        return call._replace(is_causal=mask.is_causal, key_weights=mask.keys)
    added = mask.tensor()
    return call._replace(
        mask=added.unflatten(0, call.query.shape[:2]) if added.dim() == 3 else added
    )


def hide_later(scores: Tensor) -> Tensor:
    """(..., Lq, L) scores, with -inf where the key's place is behind the query's."""
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(is_later, -torch.inf)


def attention_matrix(call: AttentionCall) -> Tensor:
    """The attention of each query to each key, (B, H, Lq, L) float32; rows sum to 1."""
    if isinstance(call.key_weights, AttentionRule):
        return call.key_weights.matrix(call)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    scores = scale * call.query.float() @ call.key.float().mT
    if call.mask is not None:
        scores = scores + call.mask.float()
    if call.is_causal:
        scores = hide_later(scores)
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
    return linear(tokens, weight[rows], None if bias is None else bias[rows])


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
        self, tokens: Tensor, mask: Tensor | KnownMask | None = None, changes: Changes = NO_CHANGES
    ) -> AttentionCall:
        """The attention call of tokens (B, L, D), as adapters leave it.

        Args:
            tokens: (B, L, D), normalised as the block does it.
            mask: Added to the scores, or known to a text tower.
            changes: Of the pass under way, from the block.
        """
        query, key, value = self.project(tokens, slice(0, 3))
        call = AttentionCall(query, key, value, backend=self._backend)
        return changes.of(under_mask(call, mask, bool(changes.modifiers)))

    def first_tokens(self, tokens: Tensor, count: int) -> Tensor:
        """(B, L, D) -> (B, count, D): the output of the first tokens, which attend to all."""
        (query,) = self.project(tokens[:, :count], slice(0, 1))
        key, value = self.project(tokens, slice(1, 3))
        return self.output(attend(AttentionCall(query, key, value, backend=self._backend)))


class OpenedLinear(Opened, nn.Linear):
    """A linear map with LoRA on it, for families whose projections are modules of their own."""

    plain = nn.Linear
    low_rank: Any

    def forward(self, input: Tensor) -> Tensor:
        return self.low_rank.project(input, self.weight, self.bias)


class _SplitHeads(torch.autograd.Function):
    """Query, key and value of a packed projection, whose gradients often lie packed too."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        return _parts_of(projected, num_heads, 3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first = grads[0]
        if torch.is_grad_enabled() or not lie_packed(*grads):
            return torch.cat([join_heads(grad) for grad in grads], -1), None
        batch, heads, length, width = first.shape
        row = 3 * heads * width
        return first.as_strided((batch, length, row), (length * row, row, 1)), None


def _parts_of(projected: Tensor, num_heads: int, count: int) -> tuple[Tensor, ...]:
    batch, length, width = projected.shape
    # Not one view of all: then their gradients would be stacked, and copied back in order.
    whole = (projected,) if count == 1 else projected.split(width // count, dim=2)
    shape = (batch, length, num_heads, width // (count * num_heads))
    return tuple(part.view(shape).transpose(1, 2) for part in whole)


def split_heads(
    projected: Tensor, num_heads: int, parts: slice = slice(0, 3)
) -> tuple[Tensor, ...]:
    """(B, L, parts H d) -> (B, H, L, d) for each of the parts, without a copy.

    Nor are the gradients of all three copied, where ``weighted_attention`` or
    ``reweighted_attention`` made them: it writes them side by side.
    """
    count = parts.stop - parts.start
    # What traces or transforms operators knows better without the function.
    is_seen_through = is_transformed() or torch.jit.is_tracing()
    if count == 3 and projected.requires_grad and not is_seen_through:
        return _SplitHeads.apply(projected, num_heads)
    return _parts_of(projected, num_heads, count)


def join_heads(attended: Tensor) -> Tensor:
    """(B, H, L, d) -> (B, L, H d)."""
    return attended.transpose(1, 2).flatten(2)
