"""One block in one forward pass, as measures see it; what several of them need is computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tir_kernels import AttentionStatistics, JointSpace, token_relevance
from tir_kernels.analysis.statistics import statistics_of
from tir_kernels.towers.attention import attention_matrix
from tir_kernels.towers.protocol import AttentionCall


@dataclass(frozen=True, eq=False)
class BlockView:
    """One block in one forward pass of B images: L tokens of width D, C classes of width E.

    Args:
        block: Number of the block, from 0.
        num_blocks: How many the tower has.
        hidden: (B, L, D), the tokens that entered the block, before any adapter.
        output: (B, L, D), the tokens that left it.
        call: Its attention, as all adapters left it, with key weights that are a tensor or none.
        num_prefix_tokens: P of the L tokens are class token and registers, in front; N = L - P.
        labels: (B,) int64, the class of each image; ``None``: unknown.
        class_embeddings: (C, E), or (G, C, E) for G groups of B / G images each, of which one after
            the other fills the batch; ``None``: unknown.
        joint_space: The map from compared tokens to the classes' space; ``None``: none is needed.
        compared_tokens: The tower's own: (B, L, D) tokens -> what is compared, (B, L, K), for the
            joint space; ``None``: the tokens themselves.
        top_ratio: Each class selects its ``int(N * top_ratio)`` most relevant patches.
        has_class_token: The first of the P tokens is a class token; else all P are registers.
    """

    block: int
    num_blocks: int
    hidden: Tensor
    output: Tensor
    call: AttentionCall
    num_prefix_tokens: int
    labels: Tensor | None = None
    class_embeddings: Tensor | None = None
    joint_space: JointSpace | None = None
    compared_tokens: Callable[[Tensor], Tensor] | None = None
    top_ratio: float = 0.3
    has_class_token: bool = True

    @property
    def num_class_tokens(self) -> int:
        """1 where a class token leads the tokens, else 0."""
        return min(self.num_prefix_tokens, int(self.has_class_token))

    @property
    def num_groups(self) -> int:
        """G; images of different groups have nothing to do with one another."""
        classes = self.class_embeddings
        return len(classes) if classes is not None and classes.dim() == 3 else 1

    @property
    def num_classes(self) -> int:
        """C; 0 where the classes are unknown."""
        return 0 if self.class_embeddings is None else self.class_embeddings.shape[-2]

    @property
    def token_groups(self) -> dict[str, slice]:
        """Groups of tokens that are never mixed, by name; only those that the tower has."""
        prefix, length = self.num_prefix_tokens, self.hidden.shape[1]
        groups = {
            "patches": slice(prefix, length),
            "class token": slice(0, self.num_class_tokens),
            "registers": slice(self.num_class_tokens, prefix),
        }
        return {name: part for name, part in groups.items() if part.stop > part.start}

    @cached_property
    def attention(self) -> AttentionStatistics:
        """Attention received per key, entropy and log-sum-exp per query."""
        return statistics_of(self.call, self.num_prefix_tokens)

    @cached_property
    def received(self) -> Tensor:
        """(B, H, L) float32, attention that each key receives, as a mean over all L queries."""
        prefix, length = self.num_prefix_tokens, self.hidden.shape[1]
        found = self.attention
        total = (
            prefix * found.received_from_prefix + (length - prefix) * found.received_from_patches
        )
        return total / length

    @cached_property
    def class_token_row(self) -> Tensor:
        """(B, H, L) float32, the attention of the first token to each key."""
        mask = self.call.mask
        mask = None if mask is None else mask[..., :1, :]
        first = self.call._replace(query=self.call.query[:, :, :1], mask=mask)
        return attention_matrix(first)[:, :, 0]

    @cached_property
    def relevance(self) -> Tensor:
        """(B, C, N) float32, cosine of each patch that entered with each class."""
        if self.class_embeddings is None:
            raise ValueError("relevance needs class_embeddings")
        compared = (
            self.hidden if self.compared_tokens is None else self.compared_tokens(self.hidden)
        )
        return token_relevance(
            compared,
            self.class_embeddings,
            joint_space=self.joint_space,
            num_prefix_tokens=self.num_prefix_tokens,
        )

    @cached_property
    def selected(self) -> Tensor:
        """(B, C, N) bool, the patches that each class selects; ties go to the lower index."""
        ranked = self.relevance.nan_to_num(nan=-torch.inf).sort(
            dim=-1, descending=True, stable=True
        )
        top_k = int(self.relevance.shape[2] * self.top_ratio)
        chosen = torch.zeros_like(self.relevance, dtype=torch.bool)
        return chosen.scatter_(2, ranked.indices[..., :top_k], True)

    @cached_property
    def counts(self) -> Tensor:
        """(B, N) int64, how many classes select each patch."""
        return self.selected.sum(1)
