"""Nearest centroid: the classes' mean features, alone or blended with their texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import centroids
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP, share
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Centroid(Method):
    """Cosine with the mean feature of each class (prototypes); nothing is trained.

    ``p_c = normalise(mean of the class's f)``, ``logits = logit_scale f pᵀ``, on features f behind
    the tower's projection; of several views, f is the direction of their mean. With a text weight λ
    the class vectors are ``normalise((1 - λ) p + λ t)``, and without one no text is read. Centred,
    the mean of the classes' mean features is taken from every feature, which then gets unit length.
    """

    name = "centroid"
    source = "arXiv 1703.05175"
    family = "frozen features"
    shown_fields: ClassVar[tuple[str, ...]] = ("centre", "text_weight")

    centre: str = fields.choice(
        "none", ("none", "support"), 'What is taken from features first: "none", or their mean.'
    )
    text_weight: float = fields.real(
        0.0, "Share of the texts in the class vectors, in [0, 1].", least=0
    )
    logit_scale: float = fields.real(10.0, LOGIT_SCALE_HELP, least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        share("text_weight", self.text_weight)
        if self.text_weight and self.centre != "none":
            raise ValueError(
                "text_weight must be 0 with centre='support', since texts have another mean than "
                f"images; got {self.text_weight}"
            )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Centroids(self, kit)


class _Centroids(FrozenFeatures):
    def __init__(self, method: Centroid, kit: Kit) -> None:
        super().__init__(kit, method.logit_scale, method.template, method.text_weight > 0)
        self._text_weight = method.text_weight
        self._is_centred = method.centre == "support"
        self._mean: Tensor | None = None

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        features, labels = self.averaged(inputs, labels)
        if self._is_centred:
            members = self.members(labels)
            # The mean of means: else a class of many images would be the origin.
            means = members.mT @ features / members.sum(1)[..., None].clamp(min=1)
            self._mean = means.mean(1, keepdim=True)  # (G, 1, E)
            features = features - self._mean
        self._centroids = centroids(features, labels, self._num_classes)

    def classes(self) -> Any:
        """(G, C, E) class vectors of unit length."""
        from torch.nn.functional import normalize

        if not self._text_weight:
            return self._centroids
        own, weight = self._centroids, self._text_weight
        return normalize((1 - weight) * own + weight * self.texts(), dim=-1)

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from torch.nn.functional import normalize

        features = normalize(inputs.float(), dim=-1)
        return super().logits(features if self._mean is None else features - self._mean, classes)

    def trained(self) -> dict[str, Tensor]:
        """ "centroids" (G, C, E); centred, the "mean" (G, 1, E) too."""
        mean = {} if self._mean is None else {"mean": self._mean}
        return {"centroids": self._centroids, **mean}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._centroids, self._mean = trained["centroids"], trained.get("mean")
