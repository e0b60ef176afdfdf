"""Class vectors trained on frozen features, compared with these by their directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP, rate, steps
from tir_kernels.fewshot.methods.protocol import Kit, Method, ParameterGroup
from tir_kernels.fewshot.methods.schedules import warmed_cosine
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor

# Directions alone decide the logits, but a step turns a long vector less than a short one. The
# programs start from texts as they come off OpenAI's towers, of length about 10; others' differ.
TEXT_NORM = 10.0


@dataclass(frozen=True)
class ClassVectorOptions(Method):
    """The options that methods with trained class vectors share."""

    family = "frozen features"

    steps: int = steps(300)
    feature_lr: float = rate(0.1)
    logit_scale: float = fields.real(100.0, LOGIT_SCALE_HELP, least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)


class ClassVectors(FrozenFeatures):
    """``logits = logit_scale f normalise(W)ᵀ``, W (G, C, E) from the texts' embeddings on, SGD.

    Steps see each support image once: the mean of its views.
    """

    _weights: Tensor

    def __init__(self, method: ClassVectorOptions, kit: Kit, reads_texts: bool = True) -> None:
        super().__init__(kit, method.logit_scale, method.template, reads_texts)
        self._steps, self._rate = method.steps, method.feature_lr

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        from torch import nn

        self._weights = nn.Parameter(TEXT_NORM * self.start_of(inputs, labels).float())

    def start_of(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """(G, C, E) directions that W starts in."""
        return self.texts()

    def training_set(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.averaged(inputs, labels)

    def classes(self) -> Any:
        """(G, C, E) directions of the class vectors."""
        from torch.nn.functional import normalize

        return normalize(self._weights, dim=-1)

    def parameters(self) -> list[ParameterGroup]:
        weights: Any = self._weights
        schedule = warmed_cosine(self._steps, self._rate)
        return [ParameterGroup([weights], "SGD", {"lr": self._rate, "momentum": 0.9}, schedule)]

    def trained(self) -> dict[str, Tensor]:
        """ "weights" (G, C, E), whose lengths play no part in the logits."""
        return {"weights": self._weights}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._weights = trained["weights"]
