"""What all learners share that leave the image tower alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from torch import Tensor


class FrozenImages(Learner):
    """Inputs are the tower's own image features (G, S, E), not normalised.

    One that changes the tower's forward pass must set ``inputs_kind`` to ``None``.
    """

    inputs_kind: str | None = "features"

    def __init__(self, kit: Kit) -> None:
        self._encoder = kit.encoder

    def inputs(self, images: Tensor) -> Tensor:
        tokens = self._encoder.embed(images.flatten(0, 1))
        return self._encoder.features(tokens).unflatten(0, images.shape[:2])
