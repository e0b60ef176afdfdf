"""What all methods share that change a frozen image tower's forward pass and train nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import FrozenImages, centroids
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import (
    LOGIT_SCALE_HELP,
    TEMPLATE_HELP,
    FrozenFeatures,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

CLASSIFIERS = ("text", "centroid")


@dataclass(frozen=True)
class ChangedTower(Method):
    """A frozen tower whose forward pass is changed; classes are prompts, or centroids."""

    family = "inference only"

    classifier: str = fields.choice(
        "text",
        CLASSIFIERS,
        'What an image is compared with: "text", the classes\' prompts, or "centroid", for each '
        "class the mean of its support images' features (of unit length, by the tower as it is "
        "changed), where text is at chance or the model has none.",
    )
    logit_scale: float | None = fields.real(None, LOGIT_SCALE_HELP)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        with self.change(kit):
            yield ChangedFeatures(self, kit, self.inputs_kind(kit))

    def change(self, kit: Kit) -> AbstractContextManager[Any]:
        """The change, on the kit's model for as long as the context lasts."""
        raise NotImplementedError

    def inputs_kind(self, kit: Kit) -> str | None:
        """What the features under the change are, if each image's depend on it alone."""
        names = [each.name for each in dataclasses.fields(self)]
        own = {name: getattr(self, name) for name in names if name not in _OF_CLASSES}
        return f"features of {self.name} {own}"


_OF_CLASSES = {each.name for each in dataclasses.fields(ChangedTower)}


class ChangedFeatures(FrozenImages):
    """Cosines of the changed tower's image features with the classes.

    Args:
        method: The method.
        kit: What it is made from.
        inputs_kind: That of the features under the change; ``None``: they are this learner's own.
    """

    def __init__(self, method: ChangedTower, kit: Kit, inputs_kind: str | None) -> None:
        from tir_kernels.fewshot.methods.prompts import default_logit_scale

        super().__init__(kit)
        self.inputs_kind = inputs_kind
        self._logit_scale = default_logit_scale(method.logit_scale, kit.shots)
        self._text: FrozenFeatures | None = None
        if method.classifier == "text":
            self._text = FrozenFeatures(kit, method.logit_scale, method.template)
        self._centroids: Tensor | None = None

    def features(self, inputs: Tensor) -> Tensor:
        """(G, S, E) image features of inputs, which are those already."""
        return inputs

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Take the centroids, if images are compared with those."""
        if self._text is None:
            features, labels = self.averaged(self.features(inputs), labels)
            self._centroids = centroids(features, labels, self._num_classes)

    def classes(self) -> Tensor:
        """(G, C, E) of unit length."""
        if self._text is not None:
            return self._text.classes()
        assert self._centroids is not None
        return self._centroids

    def show_classes(self, classes: Any) -> Tensor:
        return classes

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from tir_kernels.fewshot.methods.prompts import cosine_logits

        return cosine_logits(self.features(inputs), classes, self._logit_scale)

    def trained(self) -> dict[str, Tensor]:
        """ "centroids" (G, C, E), if images are compared with those."""
        return {} if self._centroids is None else {"centroids": self._centroids}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        if self._text is None:
            self._centroids = trained["centroids"]
