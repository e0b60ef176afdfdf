"""Tip-Adapter with numbers found by leaving out one support image at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor

ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
BETAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.5, 8.0, 12.0, 20.0)
TEXT_WEIGHTS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.0)
_AT_ONCE = 256  # images that are left out in turn


@dataclass(frozen=True)
class TipAdapterLOO(Method):
    """Tip-Adapter, training-free, with alpha, beta and a text weight found on the support images.

    ``logits = λ logit_scale f tᵀ + alpha M``, with M (C) for each class the mean of
    ``exp(-beta (1 - f k))`` over its keys k. Of a grid, those numbers are taken that give the least
    cross entropy of the support images, each classified by the keys of all others. The published
    results search alpha and beta on validation images, which a few-shot task does not have, and add
    up a class's keys; with as many images of each class that is another alpha alone.
    """

    name = "tip-adapter-loo"
    source = "arXiv 2207.09519"
    family = "frozen features"

    logit_scale: float = fields.real(100.0, LOGIT_SCALE_HELP, least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        if kit.shots < 2:
            _refuse()
        yield _Searched(self, kit)


class _Searched(FrozenFeatures):
    def __init__(self, method: TipAdapterLOO, kit: Kit) -> None:
        super().__init__(kit, method.logit_scale, method.template)

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        import torch

        self._keys, labels = self.averaged(inputs, labels)
        members = self.members(labels)  # (G, N, C)
        counts = members.sum(1, keepdim=True)
        if counts.min() < 2:
            _refuse()
        self._values = members / counts
        losses = [self._losses(beta, members, labels) for beta in BETAS]
        best = torch.stack(losses, 1).flatten(1).argmin(1)  # (G,)
        places = torch.unravel_index(best, (len(BETAS), len(ALPHAS), len(TEXT_WEIGHTS)))
        self._betas, self._alphas, self._text_weights = (
            best.new_tensor(grid, dtype=torch.float32)[place][:, None, None]
            for grid, place in zip((BETAS, ALPHAS, TEXT_WEIGHTS), places, strict=True)
        )

    def _losses(self, beta: float, members: Tensor, labels: Tensor) -> Tensor:
        """(G, alphas, text weights) mean cross entropies of images that are left out."""
        import torch

        device, count = members.device, members.shape[1]
        alphas = torch.tensor(ALPHAS, device=device)[:, None, None, None, None]
        text_weights = torch.tensor(TEXT_WEIGHTS, device=device)[:, None, None, None]
        total = torch.zeros(len(ALPHAS), len(TEXT_WEIGHTS), len(members), device=device)
        for first in range(0, count, _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            texts = FrozenFeatures.logits(self, self._keys[:, rows], self.texts())
            affinities = self._affinities(self._keys[:, rows], beta)
            affinities.diagonal(first, 1, 2).zero_()
            sums = affinities @ members
            # Of its own class, a left-out image sees one key less.
            caches = sums.float() / (members.sum(1, keepdim=True) - members[:, rows])
            logits = text_weights * texts + alphas * caches  # (alphas, text weights, G, n, C)
            picked = logits.log_softmax(-1).mul(members[:, rows]).sum((-1, -2))
            total -= picked / count
        return total.movedim(-1, 0)

    def _affinities(self, features: Tensor, beta: float | Tensor) -> Tensor:
        """(G, n, E) features of unit length -> (G, n, N)."""
        return (-beta * (1 - (features @ self._keys.mT).float())).exp()

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from torch.nn.functional import normalize

        affinities = self._affinities(normalize(inputs.float(), dim=-1), self._betas)
        cache = (affinities @ self._values).float()
        return self._text_weights * super().logits(inputs, classes) + self._alphas * cache

    def trained(self) -> dict[str, Tensor]:
        """ "keys" (G, N, E), "values" (G, N, C), and "alpha", "beta", "text_weight" (G, 1, 1)."""
        return {
            "keys": self._keys,
            "values": self._values,
            "alpha": self._alphas,
            "beta": self._betas,
            "text_weight": self._text_weights,
        }

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._keys, self._values = trained["keys"], trained["values"]
        self._alphas, self._betas = trained["alpha"], trained["beta"]
        self._text_weights = trained["text_weight"]


def _refuse() -> None:
    raise ValueError(
        "tip-adapter-loo leaves out one support image of a class and asks the others, so it needs "
        "at least 2 of each class; take tip-adapter with fixed numbers, or more images (the "
        "held-out trainings of a classifier see fewer than it does)"
    )
