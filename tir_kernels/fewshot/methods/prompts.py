"""Class prompts of several episodes, with a learned context each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.adapters import PromptContext
from tir_kernels.fewshot.methods.protocol import Kit


class Prompts(nn.Module):
    """The prompts of G episodes of C classes, padded to one length.

    Attributes:
        vectors: (G, num_vectors, W) parameter, the contexts.
        num_blocks: Depth of the text tower.
    """

    def __init__(self, contexts: Sequence[PromptContext]) -> None:
        super().__init__()
        self.num_blocks = contexts[0].num_blocks
        self._tower = contexts[0].tower
        self._first = contexts[0].first
        embeddings = [context.embeddings for context in contexts]
        longest = max(each.shape[1] for each in embeddings)
        # Attention is causal wherever prompts differ in length, so what follows changes nothing.
        self._embeddings = torch.cat(
            [F.pad(each, (0, 0, 0, longest - each.shape[1])) for each in embeddings]
        )
        self._last_position = torch.cat([context.last_position for context in contexts])
        masks = [context.key_mask for context in contexts if context.key_mask is not None]
        self._key_mask = torch.cat(masks) if masks else None
        self.vectors = nn.Parameter(torch.stack([context.vectors.detach() for context in contexts]))

    @classmethod
    def of_kit(cls, kit: Kit, num_vectors: int, template: str | None = None) -> Prompts:
        """Prompts with contexts of so many vectors, drawn by the episodes' seeds where drawn."""
        generators = [torch.Generator().manual_seed(seed) for seed in kit.seeds]
        return cls(
            [
                PromptContext(
                    kit.model, kit.tokenizer, names, num_vectors, generator, template=template
                )
                for names, generator in zip(kit.class_names, generators, strict=True)
            ]
        )

    def forward(self, text_layer: int | None = None) -> tuple[Tensor, Tensor]:
        """(G, C, E) class embeddings of the last text block, and of block ``text_layer``."""
        num_episodes = len(self.vectors)
        context = self.vectors.repeat_interleave(len(self._embeddings) // num_episodes, 0)
        embeddings = PromptContext.insert(context, self._embeddings, self._first)
        final, intermediate = self._tower.encode(
            embeddings, self._last_position, text_layer, self._key_mask
        )
        return final.unflatten(0, (num_episodes, -1)), intermediate.unflatten(0, (num_episodes, -1))


def cosine_logits(features: Tensor, class_embeddings: Tensor, logit_scale: float) -> Tensor:
    """(G, S, E) features and (G, C, E) embeddings of unit length -> (G, S, C) scaled cosines."""
    return logit_scale * F.normalize(features.float(), dim=-1) @ class_embeddings.mT


def default_logit_scale(logit_scale: float | None, shots: int) -> float:
    """The factor of the cosine: that given, or the one published for so many shots."""
    if logit_scale is not None:
        return float(logit_scale)
    return 2.0 if shots == 1 else 4.0  # arXiv 2605.25799
