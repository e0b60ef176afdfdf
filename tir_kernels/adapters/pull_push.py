"""Patch tokens moved towards the class they are nearest to, or away from the one they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.adapters.block_change import BlockChange
from tir_kernels.scalars import real_number
from tir_kernels.towers import vision_tower
from tir_kernels.towers.protocol import Block, VisionTower


class PullPush(BlockChange):
    """Handle of :func:`add_pull_push`; as a context manager it removes itself at the end.

    Attributes:
        pull, push: (G, depth) parameters, the strengths of each block.
    """

    changes_attention = False

    def __init__(
        self, tower: VisionTower, pull: Tensor, push: Tensor, ratios: tuple[float, float]
    ) -> None:
        super().__init__(tower, range(len(tower.blocks)))
        self.pull, self.push = nn.Parameter(pull), nn.Parameter(push)
        self._proj = tower.joint_space.proj
        self._ratios = ratios
        self._classes: Tensor | None = None

    def parameters(self) -> list[nn.Parameter]:
        return [self.pull, self.push]

    def set_class_embeddings(self, class_embeddings: Tensor) -> None:
        """Set the (G, C, E) classes, needed before the first forward pass; gradients flow to it."""
        assert self._proj is not None
        normed = F.layer_norm(class_embeddings.float(), class_embeddings.shape[-1:])
        self._classes = normed @ self._proj.detach().float().mT  # (G, C, D)

    def moved(self, hidden: Tensor, layer: int) -> Tensor:
        """(B, L, D) that enter a block, with the patch tokens moved."""
        if self._classes is None:
            raise RuntimeError(
                "class embeddings are not set: call handle.set_class_embeddings((G, C, E) tensor) "
                "before the model's first forward pass"
            )
        classes = self._classes.repeat_interleave(len(hidden) // len(self._classes), 0)
        patches = hidden[:, self._num_prefix_tokens :]
        cosines = F.normalize(patches.float(), dim=-1) @ F.normalize(classes, dim=-1).mT
        nearest, farthest = (
            take(-1).indices[..., None].expand(-1, -1, classes.shape[-1])
            for take in (cosines.max, cosines.min)
        )
        closeness = cosines.amax(-1)
        count = patches.shape[1]
        head, tail = (
            torch.zeros_like(closeness).scatter_(
                1, closeness.topk(int(ratio * count), 1, is_largest).indices, 1.0
            )
            for ratio, is_largest in zip(self._ratios, (True, False), strict=True)
        )
        pull, push = (
            each[:, layer].repeat_interleave(len(hidden) // len(each))[:, None, None]
            for each in (self.pull, self.push)
        )
        change = pull * head[..., None] * classes.gather(1, nearest)
        change = change - push * tail[..., None] * classes.gather(1, farthest)
        return torch.cat(
            [hidden[:, : self._num_prefix_tokens], (patches + change).to(hidden.dtype)], 1
        )

    def enter(self, block: Block, layer: int, hidden: Tensor) -> tuple[Tensor, None]:
        return self.moved(hidden, layer), None


def add_pull_push(
    model: Any,
    pull: float = 0.8,
    push: float = 0.01,
    *,
    pull_layers: Sequence[int] | None = None,
    head_ratio: float = 0.1,
    tail_ratio: float = 0.1,
    num_episodes: int = 1,
) -> PullPush:
    """Move patch tokens in front of every vision block, by their cosines to the classes.

    With T the class embeddings, normalised without gain and multiplied by the transpose of the
    tower's last projection: the share ``head_ratio`` of the patches that are closest to any class
    gets ``pull`` times its nearest class's T added, and the share ``tail_ratio`` that is farthest
    from all gets ``push`` times the T of the class it is farthest from subtracted (both shares
    rounded down). The strengths are parameters, one a block and episode.

    Args:
        model: A model whose image tower can be opened and ends in one linear projection.
        pull: Strength at the start in ``pull_layers``; 0 elsewhere.
        push: Strength at the start in all blocks.
        pull_layers: Blocks; ``None``: depth - 4, which is 8 of 12.
        head_ratio, tail_ratio: Shares in [0, 1].
        num_episodes: G groups of images, one after the other, with strengths of their own.

    Raises:
        TypeError: A tower without such a projection, or that can't be opened.
        ValueError: A number outside of its range.
    """
    tower = vision_tower(model)
    depth = len(tower.blocks)
    for name, ratio in (("head_ratio", head_ratio), ("tail_ratio", tail_ratio)):
        if not 0 <= real_number(name, ratio) <= 1:
            raise ValueError(f"{name} must lie in [0, 1]; got {ratio}")
    chosen = [depth - 4] if pull_layers is None else list(pull_layers)
    if not all(-depth <= layer < depth for layer in chosen):
        raise ValueError(f"pull_layers must lie between 0 and {depth - 1}; got {tuple(chosen)}")
    proj = tower.joint_space.proj
    query = tower.blocks[0].linears["q"]
    weight = next(query.owner.parameters())
    probe = torch.zeros(1, tower.num_prefix_tokens + 1, query.shape[2]).to(weight)
    if proj is None or tower.compared_tokens(probe) is not probe:
        raise TypeError(
            "model's image tower does not end in one linear projection of its tokens, which brings "
            "class embeddings among them; choose one that pools a token and projects it"
        )
    strengths = torch.zeros(num_episodes, depth, device=proj.device)
    at_start = strengths.clone()
    at_start[:, chosen] = real_number("pull", pull)
    return PullPush(
        tower, at_start, strengths + real_number("push", push), (head_ratio, tail_ratio)
    )
