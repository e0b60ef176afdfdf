"""Image towers of transformers' CLIP and SigLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers.run import features_of_patches, joint_space_of, unchanged_tokens
from tir_kernels.towers.transformers.blocks import TransformersBlock, blocks_of


@dataclass(eq=False)
class TransformersVision:
    """An image tower of transformers, in what CLIP's and SigLIP's share."""

    module: Any
    path: str  # in the model
    projection: Any = None

    num_prefix_tokens = 0
    reads: ClassVar[int | None] = None  # SigLIP's pool reads all tokens
    patch_features = features_of_patches

    @property
    def blocks(self) -> list[TransformersBlock]:
        return blocks_of(self.module.encoder, self.path)

    @property
    def pools(self) -> list[nn.Module]:
        return [self.module.head]

    @property
    def joint_space(self) -> JointSpace:
        return JointSpace(norm_eps=None)

    def compared_tokens(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), what the pool makes of each token alone."""
        head = self.module.head
        attention, width = head.attention, head.attention.embed_dim
        home = head.probe.device  # not the tokens' in a replica of nn.DataParallel
        tokens = self.module.post_layernorm(hidden.to(home))
        values = slice(2 * width, None)
        projected = F.linear(
            tokens, attention.in_proj_weight[values], attention.in_proj_bias[values]
        )
        pooled = attention.out_proj(projected)
        return (pooled + head.mlp(head.layernorm(pooled))).to(hidden.device)

    def embed(self, images: Tensor) -> Tensor:
        return self.module.embeddings(images)

    def norm_pre(self, tokens: Tensor) -> Tensor:
        """What tokens with positions go through in front of the first block, each alone."""
        return tokens

    def pool(self, hidden: Tensor) -> Tensor:
        return self.module.head(self.module.post_layernorm(hidden))


class ClipVision(TransformersVision):
    """CLIP's image tower, whose features are those of the class token."""

    num_prefix_tokens = 1
    reads = 1
    pools: ClassVar[list[nn.Module]] = []  # its class token alone
    compared_tokens = unchanged_tokens

    @property
    def joint_space(self) -> JointSpace:
        projection = None if self.projection is None else self.projection.weight.T
        return joint_space_of(self.module.post_layernorm, projection)

    def embed(self, images: Tensor) -> Tensor:
        return self.norm_pre(self.module.embeddings(images))

    def norm_pre(self, tokens: Tensor) -> Tensor:
        """What tokens with positions go through in front of the first block, each alone."""
        return self.module.pre_layrnorm(tokens)

    @property
    def final_projection(self) -> Tensor | None:
        # Of another kind where an adapter of other programs is put on it.
        is_plain = type(self.projection) is nn.Linear and self.projection.bias is None
        return self.projection.weight.T if is_plain else None

    def unprojected(self, hidden: Tensor) -> Tensor:
        return self.module.post_layernorm(hidden[:, 0])

    def pool(self, hidden: Tensor) -> Tensor:
        pooled = self.unprojected(hidden)
        return pooled if self.projection is None else self.projection(pooled)


class Siglip2Vision(TransformersVision):
    """SigLIP 2's image tower for images of any grid, here of images that share one."""

    norm_pre: ClassVar[None] = None  # type: ignore[assignment]  # masks are those of patches

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, D); H and W are multiples of the patches' side."""
        embeddings = self.module.embeddings
        side = embeddings.patch_size
        batch, channels, height, width = images.shape
        if height % side or width % side:
            raise ValueError(
                f"images must have sides that are multiples of the patches' {side} pixels; got "
                f"{height} x {width}"
            )
        grid = (height // side, width // side)
        patches = images.reshape(batch, channels, grid[0], side, grid[1], side)
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor(grid, device=images.device).expand(batch, 2)
        return embeddings(patches, shapes)


_KINDS = {"clip": ClipVision, "siglip": TransformersVision, "siglip2": Siglip2Vision}


def vision_of(model: Any, kind: str) -> TransformersVision:
    """The opened image tower of a model of a known kind.

    Raises:
        ValueError: It has no pooling, so there are no image features.
    """
    tower = getattr(model, "vision_model", model)
    if kind != "clip" and getattr(tower, "head", None) is None:
        raise ValueError(
            "model has no pooling, so it has no image features; set vision_use_head in its "
            "vision_config"
        )
    path = "" if tower is model else "vision_model."
    return _KINDS[kind](tower, path, getattr(model, "visual_projection", None))
