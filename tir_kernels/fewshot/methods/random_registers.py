"""Random registers: LoRA trained beside tokens of noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.lora import LoRA, TunedTowers
from tir_kernels.fewshot.methods.protocol import Kit, Learner, ParameterGroup
from tir_kernels.fewshot.methods.temperature_dropout import NoisyTowers

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import LoRA as Adapter
    from tir_kernels.adapters.training_noise import RandomRegisters as RandomRegistersHandle


@dataclass(frozen=True)
class RandomRegisters(LoRA):
    """LoRA and a prompt context, with tokens of noise beside each image's in training.

    16 tokens ``|σ| N(0, 1)``, drawn anew for each image and step, with a learned σ that starts at
    0.1; none in evaluation. The published method (REAP) trains so on a source domain, and masks
    patches as well, which is left out here. Without registers it is LoRA.
    """

    name = "random-registers"
    source = "arXiv 2506.02843, adapted to the target alone"
    family = "source-trained"
    presets: ClassVar = LoRA.presets
    shown_fields: ClassVar[tuple[str, ...]] = ("random_registers",)

    random_registers: int = fields.whole(
        16,
        "Tokens of noise that are appended to each image's while training.",
        least=0,
        most=1024,
        reason="no image has many more patches",
    )
    register_scale: float = fields.real(0.1, "σ, the noise's scale at first.", least=0)
    register_lr: float = fields.real(1e-3, "AdamW's learning rate for σ.", least=0)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        from tir_kernels.adapters import add_random_registers

        with self.adapted(kit) as lora:
            if not self.random_registers:
                yield TunedTowers(self, kit, lora)
                return
            with add_random_registers(
                kit.model, self.random_registers, self.register_scale, kit.seeds, kit.backend
            ) as noise:
                yield _Noisy(self, kit, lora, noise)


class _Noisy(NoisyTowers):
    noise: RandomRegistersHandle

    def __init__(
        self, method: RandomRegisters, kit: Kit, lora: Adapter, noise: RandomRegistersHandle
    ) -> None:
        super().__init__(method, kit, lora, noise)
        self._register_lr = method.register_lr

    def parameters(self) -> list[ParameterGroup]:
        own = {"lr": self._register_lr, "weight_decay": 0.01}
        return [*super().parameters(), ParameterGroup([self.noise.scale], "AdamW", own)]

    def trained(self) -> dict[str, Tensor]:
        """As of LoRA; and "register_scale" (G,)."""
        return {**super().trained(), "register_scale": self.noise.scale}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        super().restore(trained)
        with torch.no_grad():
            self.noise.scale.copy_(trained["register_scale"])
