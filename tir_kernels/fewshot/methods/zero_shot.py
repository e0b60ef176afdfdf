"""Zero-shot classification: the model as it is, with the prompt "a photo of a {}."."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method

if TYPE_CHECKING:
    from torch import Tensor

LOGIT_SCALE_HELP = "Factor of the cosine in the logits; unset: 4, or 2 for one shot."


@dataclass(frozen=True)
class ZeroShot(Method):
    """Zero-shot CLIP: nothing is trained."""

    name = "zero-shot"
    source = "arXiv 2103.00020"
    family = "frozen features"

    logit_scale: float | None = fields.real(None, LOGIT_SCALE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield FrozenFeatures(kit, self.logit_scale)


class FrozenFeatures(Learner):
    """Cosines of the tower's own image features with the class prompts' embeddings.

    The base of all learners that leave both towers alone: their inputs are features (G, S, E).
    """

    def __init__(self, kit: Kit, logit_scale: float | None) -> None:
        from tir_kernels.fewshot.methods.prompts import Prompts, default_logit_scale

        self._encoder = kit.encoder
        self._prompts = Prompts.of_kit(kit, num_vectors=0)
        self._logit_scale = default_logit_scale(logit_scale, kit.shots)

    def inputs(self, images: Tensor) -> Tensor:
        tokens = self._encoder.embed(images.flatten(0, 1))
        return self._encoder.features(tokens).unflatten(0, images.shape[:2])

    def classes(self) -> Tensor:
        """(G, C, E) class embeddings of unit length."""
        from torch.nn.functional import normalize

        return normalize(self._prompts()[0].float(), dim=-1)

    def show_classes(self, classes: Any) -> Tensor:
        return classes

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from tir_kernels.fewshot.methods.prompts import cosine_logits

        return cosine_logits(inputs, classes, self._logit_scale)
