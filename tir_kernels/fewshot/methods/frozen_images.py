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
        self._views = kit.views
        self._num_classes = len(kit.class_names[0])

    def inputs(self, images: Tensor) -> Tensor:
        tokens = self._encoder.embed(images.flatten(0, 1))
        return self._encoder.features(tokens).unflatten(0, images.shape[:2])

    def averaged(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The support images without their views: features (G, N, E) and labels (G, N).

        A feature is the mean of its image's views, made of unit length.
        """
        from torch.nn.functional import normalize

        views = inputs.float().unflatten(1, (-1, self._views))
        return normalize(views.mean(2), dim=-1), labels[:, :: self._views]

    def members(self, labels: Tensor) -> Tensor:
        """(G, N) labels -> (G, N, C), 1 where an image is of a class, else 0."""
        from torch.nn.functional import one_hot

        return one_hot(labels, self._num_classes).float()


def centroids(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(G, S, E) features and (G, S) labels -> (G, C, E) float32 mean directions, of unit length."""
    from torch.nn.functional import normalize, one_hot

    members = one_hot(labels, num_classes).float()  # (G, S, C)
    return normalize(members.mT @ normalize(features.float(), dim=-1), dim=-1)
