"""ZS-LP: a linear probe that starts as the zero-shot classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.class_vectors import ClassVectorOptions, ClassVectors
from tir_kernels.fewshot.methods.frozen_images import centroids
from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ZSLP(ClassVectorOptions):
    """ZS-LP: class vectors trained from the texts' embeddings on, without a penalty.

    ``logits = logit_scale f normalise(W)ᵀ``, W starting as the texts' embeddings, or as centroids
    of the classes, of length 10; cross entropy, SGD with momentum 0.9 and no weight decay, a cosine
    behind one step at 1e-5. The program takes texts as OpenAI's towers give them, of length about
    10, and 20 random views of each image; here the views are those of the run. From centroids, no
    text is read.
    """

    name = "zs-lp"
    source = "arXiv 2312.12730"
    shown_fields: ClassVar[tuple[str, ...]] = ("start_from",)

    start_from: str = fields.choice(
        "text", ("text", "centroids"), 'What class vectors start as: "text", or the "centroids".'
    )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Probe(self, kit)


class _Probe(ClassVectors):
    def __init__(self, method: ZSLP, kit: Kit) -> None:
        self._from_texts = method.start_from == "text"
        super().__init__(method, kit, self._from_texts)

    def start_of(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self._from_texts:
            return super().start_of(inputs, labels)
        return centroids(*self.averaged(inputs, labels), self._num_classes)
