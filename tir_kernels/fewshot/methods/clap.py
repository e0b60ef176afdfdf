"""CLAP: ZS-LP held near the texts, each class as far as zero-shot knows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.class_vectors import TEXT_NORM, ClassVectorOptions, ClassVectors
from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CLAP(ClassVectorOptions):
    """CLAP: ZS-LP with a penalty on the distance from the texts, larger where zero-shot is right.

    To the loss of ZS-LP comes ``constraint (1/C) Σ_c λ_c ‖W_c - t_c‖²``, with texts t of length 10
    and λ_c the mean zero-shot probability of the right class over a class's support images. λ stays
    as it is, as in the program's "l2". The length of texts decides the penalty's strength; the
    program takes them as OpenAI's towers give them, about 10.
    """

    name = "clap"
    source = "arXiv 2312.12730"

    constraint: float = fields.real(1.0, "Factor of CLAP's penalty; 0 is ZS-LP.", least=0)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Held(self, kit)


class _Held(ClassVectors):
    def __init__(self, method: CLAP, kit: Kit) -> None:
        super().__init__(method, kit)
        self._constraint = method.constraint

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        super().fit(inputs, labels)
        features, labels = self.averaged(inputs, labels)
        members = self.members(labels)
        right = (self.logits(features, self.texts()).softmax(-1) * members).sum(1)
        self._penalties = self._constraint * right / members.sum(1).clamp(min=1)  # (G, C)
        self._anchors = TEXT_NORM * self.texts()

    def training_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        distances = (self._weights - self._anchors).square().sum(-1)
        return super().training_losses(inputs, labels) + (self._penalties * distances).mean(1)
