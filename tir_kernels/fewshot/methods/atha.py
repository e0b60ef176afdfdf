"""ATHA: some patch tokens pulled to a class, some pushed away from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.lora import TunedTowers, VisionLoRA
from tir_kernels.fewshot.methods.protocol import Kit, Learner, ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import LoRA as Adapter
    from tir_kernels.adapters.pull_push import PullPush


@dataclass(frozen=True)
class ATHA(VisionLoRA):
    """LoRA, with head patches pulled to a class and tail patches pushed from one (after notes).

    In front of every vision block the tenth of the patches that is closest to a class gets ``pull``
    times that class's embedding, brought back among the tokens, added; the tenth that is farthest
    from all gets ``push`` times that of the farthest class subtracted. Both strengths are learned,
    one a block, by LoRA's optimizer.

    Written from public notes on the paper, not from its code, which was not to be had: where the
    notes are silent, patches alone are moved, shares are rounded down, the class embeddings are
    normalised without gain, and all else is as in the other works on LoRA of the vision tower.
    """

    name = "atha"
    source = "arXiv 2605.29776, after notes"

    pull: float = fields.real(
        0.8, "Strength of the pull at the start, in the block in front of depth - 4.", least=0
    )
    push: float = fields.real(0.01, "Strength of the push at the start, in all blocks.", least=0)
    head_ratio: float = fields.real(
        0.1, "Share of the patches that is pulled, below 1.", least=0, below=1
    )
    tail_ratio: float = fields.real(
        0.1, "Share of the patches that is pushed, below 1.", least=0, below=1
    )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        from tir_kernels.adapters.pull_push import add_pull_push

        with (
            self.adapted(kit) as lora,
            add_pull_push(
                kit.model,
                self.pull,
                self.push,
                head_ratio=self.head_ratio,
                tail_ratio=self.tail_ratio,
                num_episodes=len(kit.seeds),
            ) as moving,
        ):
            yield _Moving(self, kit, lora, moving)


class _Moving(TunedTowers):
    leaves_images_to_lora = False

    def __init__(self, method: ATHA, kit: Kit, lora: Adapter, moving: PullPush) -> None:
        super().__init__(method, kit, lora)
        self._moving = moving

    def show_classes(self, classes: Any) -> Tensor:
        self._moving.set_class_embeddings(classes)
        return classes

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        return super().logits(inputs, self.show_classes(classes))

    def parameters(self) -> list[ParameterGroup]:
        lora, *others = super().parameters()
        return [lora._replace(parameters=[*lora.parameters, *self._moving.parameters()]), *others]

    def trained(self) -> dict[str, Tensor]:
        """As of LoRA; and "pull" and "push" (G, depth)."""
        return super().trained() | {"pull": self._moving.pull, "push": self._moving.push}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        super().restore(trained)
        with torch.no_grad():
            self._moving.pull.copy_(trained["pull"])
            self._moving.push.copy_(trained["push"])
