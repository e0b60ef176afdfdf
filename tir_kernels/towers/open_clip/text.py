"""open_clip's text tower."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from tir_kernels.precision import autocast_dtype
from tir_kernels.towers.open_clip.blocks import OpenClipBlock, blocks_of
from tir_kernels.towers.run import EncodesText


class OpenClipText(EncodesText):
    """open_clip's text tower, whether it is part of the model (CLIP) or a module of its own."""

    def __init__(self, owner: Any, path: str, pool_type: str, eos_id: int | None) -> None:
        self._owner = owner
        self._path = path
        self._pool_type = pool_type
        self._eos_id = eos_id

    @property
    def blocks(self) -> list[OpenClipBlock]:
        return blocks_of(self._owner.transformer, self._path)

    @property
    def is_causal(self) -> bool:
        return self._owner.attn_mask is not None

    def embed(self, token_ids: Tensor) -> Tensor:
        embedding = self._owner.token_embedding
        return embedding(token_ids.to(embedding.weight.device))

    def last_position(self, token_ids: Tensor) -> Tensor:
        """(C, T) token ids -> (C,) position whose output stands for the whole text.

        Raises:
            ValueError: The tower pools the text in a way that has no such position.
        """
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        one_position_each = positions.expand(len(token_ids), -1)[..., None]
        pooled = text_global_pool(one_position_each, token_ids, self._pool_type, self._eos_id)
        if pooled.dim() != 2:
            raise ValueError(f"model's text pooling {self._pool_type!r} keeps every token")
        return pooled[:, 0]

    def start(self, embeddings: Tensor) -> Tensor:
        dtype = embeddings.dtype
        if autocast_dtype(embeddings.device.type) is None:
            # That of the blocks; embeddings may have another.
            dtype = self._owner.transformer.get_cast_dtype()
        positions = self._owner.positional_embedding[: embeddings.shape[1]]
        return embeddings.to(dtype) + positions.to(dtype)

    def mask(self, length: int) -> Tensor | None:
        mask = self._owner.attn_mask
        return None if mask is None else mask[:length, :length]

    def pool(self, hidden: Tensor, last_position: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        pooled = self._owner.ln_final(hidden[rows, last_position])
        projection = self._owner.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
