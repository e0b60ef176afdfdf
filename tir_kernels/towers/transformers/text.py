"""Text towers of transformers' CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.run import EncodesText
from tir_kernels.towers.transformers.blocks import TransformersBlock, blocks_of, causal_mask

# What configurations said before transformers knew CLIP's own; such models take the highest id.
_LEGACY_END_OF_TEXT = 2


@dataclass(eq=False)
class TransformersText(EncodesText):
    """SigLIP's text tower: every token sees all others, and the last one stands for the text."""

    owner: Any
    path: str  # in the model
    projection: Any

    is_causal = False

    @property
    def blocks(self) -> list[TransformersBlock]:
        return blocks_of(self.owner.encoder, self.path)

    def embed(self, token_ids: Tensor) -> Tensor:
        embedding = self.owner.embeddings.token_embedding
        return embedding(token_ids.to(embedding.weight.device))

    def last_position(self, token_ids: Tensor) -> Tensor:
        """(C, T) token ids -> (C,) the last position, padding or not: texts must fill T."""
        return torch.full((len(token_ids),), token_ids.shape[1] - 1, device=token_ids.device)

    def start(self, embeddings: Tensor) -> Tensor:
        positions = self.owner.embeddings.position_embedding.weight[: embeddings.shape[1]]
        return embeddings.to(positions.dtype) + positions

    def key_mask(self, token_ids: Tensor) -> None:
        """All tokens are keys: SigLIP was trained on its padding, and CLIP is causal."""

    def mask(self, length: int, key_mask: Tensor | None = None) -> KnownMask | None:
        return None

    def pool(self, hidden: Tensor, last_position: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        pooled = self.owner.final_layer_norm(hidden[rows, last_position])
        return pooled if self.projection is None else self.projection(pooled)


class ClipText(TransformersText):
    """CLIP's text tower: causal, and the first end-of-text token stands for the text."""

    is_causal = True

    def last_position(self, token_ids: Tensor) -> Tensor:
        """(C, T) token ids -> (C,) position of the end of text, as the model itself finds it."""
        end = self.owner.eos_token_id
        if end == _LEGACY_END_OF_TEXT:
            return token_ids.argmax(1)
        return (token_ids == end).int().argmax(1)

    def mask(self, length: int, key_mask: Tensor | None = None) -> KnownMask | None:
        device = self.owner.embeddings.position_embedding.weight.device
        return KnownMask(partial(causal_mask, length, device), True)


def text_of(model: Any, kind: str) -> TransformersText:
    """The opened text tower of a model of a known kind."""
    tower = getattr(model, "text_model", model)
    path = "" if tower is model else "text_model."
    if kind == "clip":
        return ClipText(tower, path, getattr(model, "text_projection", None))
    return TransformersText(tower, path, tower.head)
