"""Tip-Adapter-F: Tip-Adapter's cache with trained keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot.methods.option_fields import rate, steps
from tir_kernels.fewshot.methods.protocol import Kit, Learner, ParameterGroup
from tir_kernels.fewshot.methods.schedules import cosine
from tir_kernels.fewshot.methods.tip_adapter import Cache, TipAdapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F with fixed numbers: Tip-Adapter whose keys are trained.

    Keys start as Tip-Adapter's and keep no unit length; AdamW with epsilon 1e-4 and weight decay
    0.01, a cosine. Each view of a support image is an image of its own to train on. The program
    keeps the epoch that is best on test images; here the last one counts. It trains on new random
    crops in every epoch, for 20 epochs, or 100 on EuroSAT.
    """

    name = "tip-adapter-f"

    steps: int = steps(20)
    feature_lr: float = rate(1e-3)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _TrainedCache(self, kit)


class _TrainedCache(Cache):
    def __init__(self, method: TipAdapterF, kit: Kit) -> None:
        super().__init__(method, kit)
        self._steps, self._rate = method.steps, method.feature_lr

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        from torch import nn

        super().fit(inputs, labels)
        self.texts()  # before steps, which may become a graph
        self._keys = nn.Parameter(self._keys)

    def parameters(self) -> list[ParameterGroup]:
        keys: Any = self._keys
        settings = {"lr": self._rate, "eps": 1e-4, "weight_decay": 0.01}
        return [ParameterGroup([keys], "AdamW", settings, cosine(max(self._steps, 1)))]
