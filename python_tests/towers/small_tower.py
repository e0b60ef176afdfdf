"""A family of towers in one file: separate projections, no class token, the mean of all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tir_kernels import JointSpace
from tir_kernels.towers.attention import OpenedAttention, OpenedLinear, attend, join_heads
from tir_kernels.towers.blocks import BlockBase
from tir_kernels.towers.opening import NO_CHANGES, Changes, Opened
from tir_kernels.towers.protocol import Linear
from tir_kernels.towers.run import features_of_patches, joint_space_of, unchanged_tokens


class SmallAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(32, 32) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = (q @ k.mT / 4).softmax(-1) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class SmallBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), SmallAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class SmallTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList(SmallBlock() for _ in range(3))
        self.norm = nn.LayerNorm(32)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


# From here on: what a family has to give.


class _OpenedAttention(OpenedAttention, SmallAttention):
    plain = SmallAttention

    def project(self, tokens: Tensor, parts: slice) -> tuple[Tensor, ...]:
        projections = (self.q_proj, self.k_proj, self.v_proj)[parts]
        return tuple(p(tokens).unflatten(-1, (2, 16)).transpose(1, 2) for p in projections)

    def output(self, attended: Tensor) -> Tensor:
        return self.out_proj(join_heads(attended))

    def forward(self, x: Tensor, changes: Changes = NO_CHANGES) -> Tensor:
        return self.output(attend(self.call_of(x, None, changes)))


class _OpenedBlock(Opened, SmallBlock):
    plain = SmallBlock

    def forward(self, x: Tensor) -> Tensor:
        hidden, changes = self.enter(x)
        if not changes.modifiers:
            return self.plain_forward(hidden)
        return hidden + self.attn(self.norm(hidden), changes)


class _Block(BlockBase):
    opened: ClassVar[Mapping[type, type[Opened]]] = {
        SmallBlock: _OpenedBlock,
        SmallAttention: _OpenedAttention,
        nn.Linear: OpenedLinear,
    }

    @property
    def linears(self) -> dict[str, Linear]:
        return {
            name: Linear(getattr(self.attention, f"{name}_proj"), (1, 32, 32)) for name in "qkv"
        }

    def check_attention(self) -> None:
        pass  # there is but one kind

    def __call__(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.module(hidden)

    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None:
        return None


class _Vision:
    num_prefix_tokens = 0
    reads = None
    compared_tokens = unchanged_tokens
    patch_features = features_of_patches

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def blocks(self) -> list[_Block]:
        return [_Block(block, f"blocks.{i}") for i, block in enumerate(self.module.blocks)]

    @property
    def joint_space(self) -> JointSpace:
        return joint_space_of(self.module.norm, None)

    def embed(self, images: Tensor) -> Tensor:
        return self.module.patches(images).flatten(2).mT

    def pool(self, hidden: Tensor) -> Tensor:
        return self.module.norm(hidden).mean(1)


class Small:
    images = "a SmallTower"
    texts = ""

    @staticmethod
    def vision_tower(model: nn.Module) -> _Vision | None:
        return _Vision(model) if isinstance(model, SmallTower) else None

    @staticmethod
    def text_tower(model: nn.Module) -> None:
        return None


def make_small() -> SmallTower:
    torch.manual_seed(0)
    return SmallTower().eval()
