"""What stands for an image in a block: its class token, and the mean of its patches."""

from __future__ import annotations

from torch import Tensor

from tir_kernels.analysis.measures.protocol import BlockView


def representations(view: BlockView) -> dict[str, Tensor]:
    """Name -> (B, D) of the tokens that leave the block; only those that the tower has."""
    prefix, length = view.num_prefix_tokens, view.output.shape[1]
    found = {}
    if view.num_class_tokens:
        found["class token"] = view.output[:, 0]
    if length > prefix:
        found["mean patch"] = view.output[:, prefix:].float().mean(1)
    return found
