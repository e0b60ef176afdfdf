"""Linear probe: logistic regression on frozen image features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import FrozenImages
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LinearProbe(Method):
    """scikit-learn's logistic regression on frozen features of unit length; no text is read.

    The published few-shot probes take the penalty from validation images, which a few-shot task
    does not have; 0.316 is the one in CLIP's own example, too strong for few shots.
    """

    name = "linear-probe"
    source = "arXiv 2103.00020"
    family = "frozen features"

    fit_takes_class_weights = True
    shown_fields: ClassVar[tuple[str, ...]] = ("inverse_penalty",)

    inverse_penalty: float = fields.real(
        100.0, "C of scikit-learn's LogisticRegression (L2, L-BFGS).", least=0
    )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Probe(self, kit)


class _Probe(FrozenImages):
    def __init__(self, method: LinearProbe, kit: Kit) -> None:
        super().__init__(kit)
        self._method = method

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        import torch
        from torch.nn.functional import normalize

        features = normalize(inputs.float(), dim=-1).cpu()
        fitted = [self._fit_one(*own) for own in zip(features, labels.cpu(), strict=True)]
        weights, biases = (torch.stack(each) for each in zip(*fitted, strict=True))
        self._weights, self._bias = weights.to(inputs.device), biases.to(inputs.device)

    def _fit_one(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(C, E) weights and (C,) bias of one episode."""
        import torch
        from sklearn.linear_model import LogisticRegression

        weights = self.class_weights
        class_weight = None if weights is None else dict(enumerate(weights.tolist()))
        probe = LogisticRegression(
            C=self._method.inverse_penalty, max_iter=1000, class_weight=class_weight
        )
        probe.fit(features.double().numpy(), labels.numpy())
        rows, bias = (torch.from_numpy(each).float() for each in (probe.coef_, probe.intercept_))
        if self._num_classes == 2:  # one row, whose sign says which of the two
            rows, bias = torch.cat([-rows, rows]) / 2, torch.cat([-bias, bias]) / 2
        return rows, bias

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from torch.nn.functional import normalize

        return normalize(inputs.float(), dim=-1) @ self._weights.mT + self._bias[:, None]

    def trained(self) -> dict[str, Tensor]:
        """ "weights" (G, C, E) and "bias" (G, C)."""
        return {"weights": self._weights, "bias": self._bias}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._weights, self._bias = trained["weights"], trained["bias"]
