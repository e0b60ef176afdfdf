"""Tip-Adapter: a cache of the support images' features beside the text, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TipAdapter(Method):
    """Tip-Adapter with fixed numbers, training-free.

    ``logits = logit_scale f tᵀ + alpha exp(-beta (1 - f Kᵀ)) Y``, with the mean feature of each
    support image's views as a key K and its label as the value Y. The published results search
    alpha and beta on validation images, which a few-shot task does not have.
    """

    name = "tip-adapter"
    source = "arXiv 2207.09519"
    family = "frozen features"
    shown_fields: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    alpha: float = fields.real(1.0, "Weight of the cache beside the text.", least=0)
    beta: float = fields.real(5.5, "Sharpness of the cache.", least=0)
    logit_scale: float = fields.real(100.0, "Factor of the cosine with the text.", least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield Cache(self, kit)


class Cache(FrozenFeatures):
    """The support images' features as keys, their labels as values."""

    def __init__(self, method: TipAdapter, kit: Kit) -> None:
        super().__init__(kit, method.logit_scale, method.template)
        self._alpha, self._beta = method.alpha, method.beta

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        self._keys, labels = self.averaged(inputs, labels)  # (G, N, E)
        self._values = self.members(labels)  # (G, N, C)

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from torch.nn.functional import normalize

        cosines = normalize(inputs.float(), dim=-1) @ self._keys.mT
        affinities = (-self._beta * (1 - cosines)).exp()
        return super().logits(inputs, classes) + self._alpha * affinities @ self._values

    def trained(self) -> dict[str, Tensor]:
        """ "keys" (G, N, E) and "values" (G, N, C) of the cache."""
        return {"keys": self._keys, "values": self._values}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._keys, self._values = trained["keys"], trained["values"]
