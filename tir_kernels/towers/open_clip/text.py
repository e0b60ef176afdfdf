"""open_clip's text tower."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from tir_kernels.precision import autocast_dtype
from tir_kernels.towers.masks import KnownMask
from tir_kernels.towers.open_clip.blocks import OpenClipBlock, blocks_of
from tir_kernels.towers.run import EncodesText


@dataclass(eq=False)
class OpenClipText(EncodesText):
    """open_clip's text tower, whether it is part of the model (CLIP) or a module of its own."""

    owner: Any
    path: str  # of its transformer in the model
    pool_type: str
    eos_id: int | None

    @property
    def blocks(self) -> list[OpenClipBlock]:
        return blocks_of(self.owner.transformer, self.path)

    @property
    def is_causal(self) -> bool:
        # The class token at the end sees all, and its place is counted from the front.
        return self.owner.attn_mask is not None and self._class_token is None

    @property
    def _class_token(self) -> Tensor | None:
        return getattr(self.owner, "cls_emb", None)

    def embed(self, token_ids: Tensor) -> Tensor:
        embedding = self.owner.token_embedding
        return embedding(token_ids.to(embedding.weight.device))

    def last_position(self, token_ids: Tensor) -> Tensor:
        """(C, T) token ids -> (C,) position whose output stands for the whole text.

        Raises:
            ValueError: The tower pools the text in a way that has no such position.
        """
        if self._class_token is not None:  # pooled whatever the pool type is
            return token_ids.new_full((len(token_ids),), token_ids.shape[1])
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        one_position_each = positions.expand(len(token_ids), -1)[..., None]
        pooled = text_global_pool(one_position_each, token_ids, self.pool_type, self.eos_id)
        if pooled.dim() != 2:
            raise ValueError(
                f"model's text pooling {self.pool_type!r} keeps every token, so that none stands "
                "for the text; choose a model with pool_type first, last, argmax or eos"
            )
        return pooled[:, 0]

    def key_mask(self, token_ids: Tensor) -> Tensor | None:
        """(C, T) token ids -> (C, L), which of the blocks' tokens are attended to, if not all."""
        owner, class_token = self.owner, self._class_token
        if class_token is None and not getattr(owner, "use_pad_mask", False):
            return None
        kept = token_ids != owner.pad_id
        if class_token is None:
            return kept
        always = kept.new_ones(len(kept), 1)
        # Published weights of CoCa were trained with the class token's entry at the wrong end.
        return torch.cat([kept, always] if owner.correct_cls_mask else [always, kept], dim=1)

    def start(self, embeddings: Tensor) -> Tensor:
        dtype = embeddings.dtype
        if autocast_dtype(embeddings.device.type) is None:
            # That of the blocks; embeddings may have another.
            dtype = self.owner.transformer.get_cast_dtype()
        tokens = embeddings.to(dtype)
        if self._class_token is not None:
            class_token = self._class_token.to(dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([tokens, class_token], dim=1)
        positions = self.owner.positional_embedding[: tokens.shape[1]]
        return tokens + positions.to(dtype)

    def mask(self, length: int, key_mask: Tensor | None = None) -> KnownMask | None:
        """The mask of the blocks: (L, L), or (C H, L, L) where keys of each text are masked.

        Raises:
            ValueError: The tower masks keys, but those of the texts were not given.
        """
        owner = self.owner
        is_causal = owner.attn_mask is not None
        if key_mask is None:
            if self._class_token is not None or getattr(owner, "use_pad_mask", False):
                raise ValueError(
                    "key_mask must be given, since the text tower masks padding: pass its "
                    "key_mask(token_ids)"
                )
            return KnownMask(partial(self._added_mask, length), True) if is_causal else None
        keys = key_mask.to(owner.positional_embedding.device)
        return KnownMask(partial(self._added_mask, length, keys), is_causal, keys.float())

    def _added_mask(self, length: int, keys: Tensor | None = None) -> Tensor:
        owner = self.owner
        causal = None if owner.attn_mask is None else owner.attn_mask[:length, :length]
        if keys is None:
            assert causal is not None
            return causal
        added = torch.zeros(keys.shape, device=keys.device).masked_fill(~keys, -torch.inf)
        mask = added[:, None].expand(-1, length, -1)
        mask = mask if causal is None else mask + causal
        return mask.repeat_interleave(owner.heads, 0)

    def pool(self, hidden: Tensor, last_position: Tensor) -> Tensor:
        # Not by two indices, whose gradient a GPU would have to sort.
        place = last_position[:, None, None].expand(-1, 1, hidden.shape[2])
        pooled = self.owner.ln_final(hidden.gather(1, place)[:, 0])
        projection = self.owner.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
