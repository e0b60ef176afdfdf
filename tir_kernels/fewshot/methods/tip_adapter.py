"""Tip-Adapter: a cache of the support images' features beside the text, without training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    shown_fields = ("alpha", "beta")

    alpha: float = fields.real(1.0, "Weight of the cache beside the text.", least=0)
    beta: float = fields.real(5.5, "Sharpness of the cache.", least=0)
    logit_scale: float = fields.real(100.0, "Factor of the cosine with the text.", least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Cache(self, kit)


class _Cache(FrozenFeatures):
    def __init__(self, method: TipAdapter, kit: Kit) -> None:
        super().__init__(kit, method.logit_scale, method.template)
        self._method = method
        self._views = kit.views
        self._num_classes = len(kit.class_names[0])

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        from torch.nn.functional import normalize, one_hot

        features = inputs.float().unflatten(1, (-1, self._views))
        self._keys = normalize(features.mean(2), dim=-1)  # (G, N, E)
        self._values = one_hot(labels[:, :: self._views], self._num_classes).float()  # (G, N, C)

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from torch.nn.functional import normalize

        cosines = normalize(inputs.float(), dim=-1) @ self._keys.mT
        affinities = (-self._method.beta * (1 - cosines)).exp()
        return super().logits(inputs, classes) + self._method.alpha * affinities @ self._values

    def trained(self) -> dict[str, Tensor]:
        """ "keys" (G, N, E) and "values" (G, N, C) of the cache."""
        return {"keys": self._keys, "values": self._values}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._keys, self._values = trained["keys"], trained["values"]
