"""LP++: a linear probe beside the texts, with step sizes that follow from the features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot.methods.option_fields import steps
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method, ParameterGroup
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor

_ALPHA_EVERY = 10  # steps
_ALPHA_START = 250.0  # times the mean cosine of the right class


@dataclass(frozen=True)
class LPPlusPlus(Method):
    """LP++: a linear probe plus texts with a learned weight for each class, without learning rates.

    ``logits = f Wᵀ + b + α ⊙ (f tᵀ)``, without a logit scale, which α stands for. W starts as the
    sums of the classes' features, b as 0, each α as 250 times the mean over classes of the mean
    cosine of their images with their text. SGD with momentum 0.9 on W and b at the rate
    ``4 N / λ_max(fᵀ f)``; every tenth step, α one step of gradient descent at
    ``N / (4 max_c Σ_i (f_i t_c)²)``. Three things differ from the program: it keeps the epoch that
    is best on validation images, here the last one counts; it never sets the gradient of α to 0, so
    that α is moved by the sum of all gradients so far, here by the present one, which is the block
    coordinate descent of the paper; and b starts at random there.
    """

    name = "lp++"
    source = "arXiv 2404.02285"
    family = "frozen features"

    steps: int = steps(300)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Probe(self, kit)


class _Probe(FrozenFeatures):
    """Each parameter is a factor of its own times what is stepped at rate 1: SGD then moves it at
    the square of that factor, another one for each episode.
    """

    def __init__(self, method: LPPlusPlus, kit: Kit) -> None:
        super().__init__(kit, 1.0, method.template)
        self._factors: dict[str, Tensor] = {}
        self._stepped: dict[str, Any] = {}

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        import torch
        from torch import nn

        features, labels = self.averaged(inputs, labels)
        members = self.members(labels)
        count = features.shape[1]
        cosines = (features @ self.texts().mT).float()
        own = (members * cosines).sum(1) / members.sum(1).clamp(min=1)  # (G, C)
        largest = torch.linalg.matrix_norm(features, 2).square()  # λ_max of fᵀ f
        rates = {
            "weights": 4 * count / largest,
            "alpha": count / (4 * cosines.square().sum(1).amax(1)),
        }
        starts = {
            "weights": members.mT @ features,
            "bias": torch.zeros_like(own),
            "alpha": (_ALPHA_START * own.mean(1, keepdim=True)).expand_as(own),
        }
        rates["bias"] = rates["weights"]
        for name, start in starts.items():
            factor = rates[name].sqrt().reshape(-1, *[1] * (start.dim() - 1))
            self._factors[name] = factor
            self._stepped[name] = nn.Parameter(start / factor)

    def training_set(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.averaged(inputs, labels)

    def classes(self) -> Any:
        """(G, C, E) vectors ``W_c + α_c t_c``, and the bias (G, C)."""
        own = self.trained()
        return own["weights"] + own["alpha"][..., None] * self.texts(), own["bias"]

    def show_classes(self, classes: Any) -> Tensor:
        vectors, _ = classes
        return vectors

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        vectors, bias = classes
        return super().logits(inputs, vectors) + bias[:, None]

    def parameters(self) -> list[ParameterGroup]:
        probe = [self._stepped["weights"], self._stepped["bias"]]
        return [
            ParameterGroup(probe, "SGD", {"lr": 1.0, "momentum": 0.9}),
            ParameterGroup([self._stepped["alpha"]], "SGD", {"lr": 1.0}, _only_every_tenth),
        ]

    def trained(self) -> dict[str, Tensor]:
        """ "weights" (G, C, E), "bias" (G, C) and "alpha" (G, C)."""
        return {name: self._factors[name] * each for name, each in self._stepped.items()}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        self._stepped = dict(trained)
        self._factors = {name: torch.ones_like(each) for name, each in trained.items()}


def _only_every_tenth(step: int) -> float:
    return float(step % _ALPHA_EVERY == _ALPHA_EVERY - 1)
