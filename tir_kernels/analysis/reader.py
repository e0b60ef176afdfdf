"""Measures of a tower: one forward pass, in which each block's attention is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tir_kernels.analysis.measures.protocol import BlockView, Finding, Measure
from tir_kernels.towers import vision_tower
from tir_kernels.towers.protocol import AttentionCall, Modifier, VisionTower


@torch.no_grad()
def measure(
    model: nn.Module | VisionTower, images: Tensor, measures: Sequence[Measure]
) -> list[Finding]:
    """What measures find in every block of an image tower.

    Args:
        model: A model whose image tower can be opened, or that tower, with whatever adapters are
            on it; it is read in evaluation mode or not, as it is.
        images: (B, 3, H, W), normalised for the model.
        measures: The measures.

    Returns:
        Their findings, block by block.

    Raises:
        TypeError, ValueError: A tower that cannot be opened.
    """
    tower = vision_tower(model)
    return measure_tokens(tower, tower.embed(images), measures)


@torch.no_grad()
def measure_tokens(
    tower: VisionTower, tokens: Tensor, measures: Sequence[Measure]
) -> list[Finding]:
    """As :func:`measure`, of embedded tokens (B, L, D)."""
    findings: list[Finding] = []

    def note(view: BlockView) -> None:
        for each in measures:
            findings.extend(each.of_block(view))

    hidden = tokens
    with ExitStack() as stack:
        for index, block in enumerate(tower.blocks):
            stack.enter_context(_read(block, _Reader(index, tower.num_prefix_tokens, note)))
        for block in tower.blocks:
            hidden = block(hidden)
    return findings


class _Reader:
    """An adapter that changes nothing, and sees the attention call as the others leave it."""

    def __init__(self, block: int, num_prefix_tokens: int, note: Any) -> None:
        self._block = block
        self._num_prefix_tokens = num_prefix_tokens
        self._note = note

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier]:
        return hidden, self._see

    def _see(self, call: AttentionCall, hidden: Tensor) -> AttentionCall:
        self._note(BlockView(self._block, hidden, call, self._num_prefix_tokens))
        return call


@contextmanager
def _read(block: Any, reader: _Reader) -> Iterator[None]:
    block.put(reader, changes_attention=True)
    try:
        yield
    finally:
        block.take(reader)
