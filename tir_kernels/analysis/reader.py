"""Measures of a tower: one forward pass, in which each block's attention is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tir_kernels import WeightRule
from tir_kernels.analysis.measures.protocol import BlockView, Finding, Measure
from tir_kernels.towers import vision_tower
from tir_kernels.towers.protocol import AttentionCall, Modifier, VisionTower


@torch.no_grad()
def measure(
    model: nn.Module | VisionTower,
    images: Tensor,
    measures: Sequence[Measure],
    *,
    labels: Tensor | None = None,
    class_embeddings: Tensor | None = None,
    top_ratio: float = 0.3,
) -> list[Finding]:
    """What measures find in every block of an image tower.

    Args:
        model: A model whose image tower can be opened, or that tower, with whatever adapters are
            on it; it is read in evaluation mode or not, as it is, and is not changed for a moment,
            but for the ``last_counts`` of a re-weighting, which are then those of this pass.
        images: (B, 3, H, W), normalised for the model, or the tokens (B, L, D) that enter the first
            block.
        measures: The measures.
        labels: (B,), the number of each image's class; ``None``: measures of classes find nothing.
        class_embeddings: (C, E), or (G, C, E) where G divides B and image b belongs to group
            ``b // (B / G)``; ``None``: measures of relevance find nothing.
        top_ratio: Each class selects its ``int(N * top_ratio)`` most relevant of N patch tokens.

    Returns:
        Their findings, block by block.

    Raises:
        TypeError, ValueError: A tower that cannot be opened, no images, labels or classes that do
            not fit, or a ratio outside [0, 1].
    """
    tower = vision_tower(model)
    if images.dim() not in (3, 4):
        raise ValueError(
            "images must be (B, 3, H, W), or their embedded tokens (B, L, D); "
            f"got {tuple(images.shape)}"
        )
    tokens = tower.embed(images) if images.dim() == 4 else images
    _check_classes(labels, class_embeddings, len(tokens))
    top_ratio = WeightRule(top_ratio=top_ratio).top_ratio  # refuses what is none
    findings: list[Finding] = []
    hidden = tokens
    blocks = tower.blocks
    for index, block in enumerate(blocks):
        reader = _Reader()
        # Not on the block itself, which other threads may be using.
        twin = block.twin()
        twin.put(reader, changes_attention=True)
        output = twin(hidden)
        view = BlockView(
            index,
            len(blocks),
            hidden,
            output,
            reader.call(),
            tower.num_prefix_tokens,
            labels,
            class_embeddings,
            tower.joint_space,
            tower.compared_tokens,
            top_ratio,
            getattr(tower, "has_class_token", True),  # towers need not say so
        )
        for each in measures:
            findings.extend(each.of_block(view))
        hidden = output
    return findings


def _check_classes(labels: Tensor | None, class_embeddings: Tensor | None, batch: int) -> None:
    if batch == 0:
        raise ValueError("measures need at least one image; got none")
    if class_embeddings is not None:
        if not isinstance(class_embeddings, Tensor) or class_embeddings.dim() not in (2, 3):
            raise ValueError("class_embeddings must be a (C, E) or (G, C, E) tensor")
        groups = len(class_embeddings) if class_embeddings.dim() == 3 else 1
        if groups < 1 or batch % groups or class_embeddings.shape[-2] < 1:
            raise ValueError(
                f"class_embeddings (G, C, E) need at least one class, and a number of groups that "
                f"divides the {batch} images; got {tuple(class_embeddings.shape)}"
            )
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError("labels must be a tensor of whole numbers")
    if labels.shape != (batch,):
        raise ValueError(
            f"labels must have shape (B,), B = {batch} images; got {tuple(labels.shape)}"
        )
    if class_embeddings is not None:
        lowest, highest = labels.min().item(), labels.max().item()
        if lowest < 0 or highest >= class_embeddings.shape[-2]:
            raise ValueError(
                f"labels must lie between 0 and {class_embeddings.shape[-2] - 1}, the last of the "
                f"class_embeddings; got {lowest} to {highest}"
            )


class _Reader:
    """An adapter that changes nothing, and keeps the attention call as the others leave it."""

    def __init__(self) -> None:
        self._call: AttentionCall | None = None

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier]:
        return hidden, self._see

    def _see(self, call: AttentionCall, hidden: Tensor) -> AttentionCall:
        weights = call.key_weights
        if weights is not None and not isinstance(weights, Tensor):
            weights = weights.form()
        self._call = call._replace(key_weights=weights)
        return call

    def call(self) -> AttentionCall:
        if self._call is None:
            raise RuntimeError("the block ran without attention that could be read")
        return self._call
