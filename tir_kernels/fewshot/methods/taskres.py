"""TaskRes: a learned residual beside the texts' embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.class_vectors import TEXT_NORM, ClassVectorOptions, ClassVectors
from tir_kernels.fewshot.methods.option_fields import rate, steps
from tir_kernels.fewshot.methods.protocol import Kit, Learner, ParameterGroup
from tir_kernels.fewshot.methods.schedules import warmed_cosine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class TaskRes(ClassVectorOptions):
    """TaskRes: the texts' embeddings plus a learned residual.

    ``logits = logit_scale f normalise(t + residual_scale R)ᵀ``, R starting as 0; Adam with weight
    decay 5e-4 and a cosine behind one step at 1e-5. Texts have length 10 here; the program takes
    them as OpenAI's towers give them, about 10, and trains for 200 epochs from 8 shots on.
    """

    name = "taskres"
    source = "arXiv 2211.10277"
    shown_fields: ClassVar[tuple[str, ...]] = ("residual_scale",)

    steps: int = steps(100)
    feature_lr: float = rate(2e-3)
    residual_scale: float = fields.real(0.5, "Factor of TaskRes's residual.", least=0)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Residuals(self, kit)


class _Residuals(ClassVectors):
    def __init__(self, method: TaskRes, kit: Kit) -> None:
        super().__init__(method, kit)
        self._scale = method.residual_scale

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        import torch
        from torch import nn

        self._residuals: Tensor = nn.Parameter(torch.zeros_like(self.texts()))

    def classes(self) -> Any:
        """(G, C, E) directions of texts and residuals."""
        from torch.nn.functional import normalize

        return normalize(TEXT_NORM * self.texts() + self._scale * self._residuals, dim=-1)

    def parameters(self) -> list[ParameterGroup]:
        residuals: Any = self._residuals
        schedule = warmed_cosine(self._steps, self._rate)
        settings = {"lr": self._rate, "weight_decay": 5e-4}
        return [ParameterGroup([residuals], "Adam", settings, schedule)]

    def trained(self) -> dict[str, Tensor]:
        """ "residuals" (G, C, E)."""
        return {"residuals": self._residuals}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._residuals = trained["residuals"]
