"""timm's transformers as image towers: VisionTransformer, and Eva with its rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers.run import features_of_patches
from tir_kernels.towers.timm.after_blocks import AfterBlocks
from tir_kernels.towers.timm.blocks import EvaTowerBlock, TimmBlock


class TimmVision:
    """timm's VisionTransformer.

    Args:
        module: The transformer.
        path: Its path in the model, with a point at the end, or "".
        head: What follows it in an open_clip model; ``None``: the transformer is the model, and its
            features are those before the classifier.
    """

    patch_features = features_of_patches

    def __init__(self, module: Any, path: str = "", head: nn.Module | None = None) -> None:
        self.module = module
        self._path = path
        self._head = head

    @property
    def num_prefix_tokens(self) -> int:
        return self.module.num_prefix_tokens

    @property
    def has_class_token(self) -> bool:
        return self.module.cls_token is not None

    @property
    def reads(self) -> int | None:
        if self.module.attn_pool is not None or self.module.global_pool != "token":
            return None
        return 2 if isinstance(self.module, VisionTransformerDistilled) else 1

    @property
    def pools(self) -> list[nn.Module]:
        return [] if self.module.attn_pool is None else [self.module.attn_pool]

    @property
    def blocks(self) -> Sequence[TimmBlock]:
        return [
            TimmBlock(block, f"{self._path}blocks.{layer}")
            for layer, block in enumerate(self.module.blocks)
        ]

    @property
    def _after_blocks(self) -> AfterBlocks:
        head = [] if self._head is None else [self.module.head, self._head]
        return AfterBlocks(self.module, head)

    @property
    def joint_space(self) -> JointSpace:
        return self._after_blocks.joint_space

    def compared_tokens(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, K), what the norms, pool and head make of each token alone."""
        return self._after_blocks.compared_tokens(hidden)

    def embed(self, images: Tensor) -> Tensor:
        tower = self.module
        return tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(images))))

    @property
    def norm_pre(self) -> Callable[[Tensor], Tensor] | None:
        """What tokens with positions go through in front of the first block, each alone.

        ``None`` where later blocks take positions too, which only the tower's own tokens have.
        """
        return self.module.norm_pre if getattr(self.module, "rope", None) is None else None

    def pool(self, hidden: Tensor) -> Tensor:
        tower = self.module
        pooled = tower.forward_head(tower.norm(hidden), pre_logits=self._head is None)
        return pooled if self._head is None else self._head(pooled)


class EvaVision(TimmVision):
    """timm's Eva. Its blocks take rotary positions, which follow from the grid of patches.

    A tower for images of any size is told the grid by :meth:`embed`: tokens that it did not embed
    must be those of images of the size that it was made for.
    """

    def __init__(self, module: Any, path: str = "", head: nn.Module | None = None) -> None:
        super().__init__(module, path, head)
        self._grids: dict[int, tuple[int, int]] = {}  # of embedded images, by number of patches
        self._made: dict[tuple[tuple[int, int], torch.device], Tensor] = {}

    @property
    def blocks(self) -> Sequence[EvaTowerBlock]:
        return [
            EvaTowerBlock(block, f"{self._path}blocks.{layer}", partial(self._rope, layer))
            for layer, block in enumerate(self.module.blocks)
        ]

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, D).

        Raises:
            ValueError: The tower changes positions at random while training, or images had as many
                patches before, in another shape.
        """
        tower = self.module
        self._require_steady_positions()
        patches = tower.patch_embed(images)
        if tower.dynamic_img_size and tower.rope is not None:
            self._remember_grid(*patches.shape[1:3])
        return tower.norm_pre(tower._pos_embed(patches)[0])

    def _require_steady_positions(self) -> None:
        tower = self.module
        if not tower.training or tower.rope is None:
            return
        if tower.patch_drop is not None or getattr(tower.rope, "aug_active", False):
            raise ValueError(
                "model drops patches or shifts their positions at random while training, which its "
                "parts can't repeat alike; call model.eval(), or make it without patch_drop_rate "
                "and without shift, jitter and rescale of rope's coordinates"
            )

    def _remember_grid(self, height: int, width: int) -> None:
        grid = self._grids.setdefault(height * width, (height, width))
        if grid != (height, width):
            raise ValueError(
                f"images have {height} x {width} patches, but others before had {grid[0]} x "
                f"{grid[1]}, as many; open the tower anew for images of another shape"
            )

    def _rope(self, layer: int, num_tokens: int) -> Tensor | None:
        """The rotary positions of a block's patches, as the tower's own forward pass makes them."""
        tower = self.module
        if tower.rope is None:
            return None
        self._require_steady_positions()
        if not tower.dynamic_img_size and hasattr(tower.rope, "feat_shape"):
            positions = tower.rope.get_embed()
        else:
            positions = self._positions(self._grid(num_tokens - self.num_prefix_tokens))
        return positions[layer] if tower.rope_mixed else positions

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The rotary positions of a grid, made once unless they are learned."""
        rope = self.module.rope
        if self.module.rope_mixed:
            return rope.get_embed(shape=grid)
        key = (grid, next(rope.buffers()).device)
        if key not in self._made:
            with torch.inference_mode(False):  # to be trained on, too
                self._made[key] = rope.get_embed(shape=grid)
        return self._made[key]

    def _grid(self, num_patches: int) -> tuple[int, int]:
        own: tuple[int, int] = self.module.patch_embed.grid_size
        if num_patches == own[0] * own[1]:
            return self._grids.get(num_patches, own)
        if num_patches not in self._grids:
            raise ValueError(
                f"tokens of {num_patches} patches were not embedded by this tower, which is made "
                f"for {own[0]} x {own[1]}, so their positions are not known; call its "
                "embed(images) first, or model.set_input_size(img_size=...)"
            )
        return self._grids[num_patches]
