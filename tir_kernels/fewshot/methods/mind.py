"""Mind: LoRA against a vision tower that tells classes apart without the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.lora import LoRA, TunedTowers, VisionLoRA
from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import LoRA as Adapter

ACTIVE_SHARE = 0.6  # of the steps, in which more than cross entropy is followed


@dataclass(frozen=True)
class Mind(VisionLoRA):
    """LoRA on the vision tower with losses against learning that goes past the text.

    With f the support views' features, f0 those of the images themselves, t the class embeddings,
    all of unit length, and s the logit scale::

        loss = CE(s f t', y) + visual_weight CE(s f R', y) + alignment_weight mean(e^G (G - f f0'))

    The rows of R are features of C views drawn anew each step, whatever their classes, with their
    gradient. G is ``w`` times ``f f0'`` of the step before, plus ``1 - w`` times the cosines of the
    two images' class embeddings; w falls from 1 to 0 over the first 60 % of the steps, after which
    cross entropy is alone, as is the third term not there at the first step.

    The third term is the published one: a divergence of numbers that are cosines and no logarithms
    of probabilities. Differs from the published program in its float16 with a gradient scaler.
    """

    name = "mind"
    source = "CVPR 2026, github.com/zhenyuZ-HUST/CVPR26-Mind-the-Discriminability-Trap"

    steps: int = fields.inherited(LoRA, "steps", 250)
    visual_weight: float = fields.real(
        0.1, "Weight of the loss against random support features in place of the text.", least=0
    )
    alignment_weight: float = fields.real(
        3.0, "Weight of the loss that draws images' cosines to those of their classes.", least=0
    )

    needs_all_images = True

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        with self.adapted(kit) as lora:
            yield _Mind(self, kit, lora)


class _Mind(TunedTowers):
    def __init__(self, method: Mind, kit: Kit, lora: Adapter) -> None:
        super().__init__(method, kit, lora)
        self._weights = method.visual_weight, method.alignment_weight
        self._steps = method.steps
        self._seeds, self._views = kit.seeds, kit.views
        self._num_classes = len(kit.class_names[0])

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Draw which views stand for the text in each step."""
        import torch

        device = inputs.device
        count = labels.shape[1]
        drawn = [
            torch.randint(
                count,
                (self._steps, self._num_classes),
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in self._seeds
        ]
        self._drawn = torch.stack(drawn, 1).to(device)  # (steps, G, C)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._before = torch.zeros(*labels.shape, count // self._views, device=device)

    def training_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        from torch.nn.functional import kl_div, normalize

        texts = self.classes()
        features = self.features(inputs)
        losses = self.loss(self.cosine_logits(features, texts), labels)

        unit = normalize(features.float(), dim=-1)
        drawn = self._drawn.index_select(0, self._step)[0]  # (G, C)
        stand_ins = unit.take_along_dim(drawn[..., None], 1)
        visual = self.loss(self.cosine_logits(features, stand_ins), labels)

        cosines = unit @ unit[:, :: self._views].mT  # (G, S, N)
        own = texts.take_along_dim(labels[..., None], 1)  # (G, S, E)
        part = self._step / (ACTIVE_SHARE * self._steps)
        target = (1 - part) * self._before + part * (own @ own[:, :: self._views].mT).detach()
        divergence = kl_div(cosines, target, reduction="none", log_target=True).mean((1, 2))
        self._before.copy_(cosines.detach())

        is_active = part < 1
        visual_weight, alignment_weight = self._weights
        further = visual_weight * visual + alignment_weight * (self._step > 0) * divergence
        return losses + is_active * further

    def next_step(self) -> None:
        super().next_step()
        self._step += 1

    def carried(self) -> Sequence[Tensor]:
        return (self._before,)
