"""Temperature dropout: LoRA trained while blocks' attention is switched off at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.lora import LoRA, TunedTowers
from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from tir_kernels.adapters import LoRA as Adapter
    from tir_kernels.adapters.training_noise import RandomRegisters
    from tir_kernels.adapters.training_noise import TemperatureDropout as TemperatureDropoutHandle


@dataclass(frozen=True)
class TemperatureDropout(LoRA):
    """LoRA and a prompt context, with uniform attention in random blocks of each training step.

    In training alone, every block of the image tower has attention scores of 0 with a probability
    of 0.8, drawn anew for each block and step. The published method trains so on a source domain,
    for an epoch at a time; here the target's support images are all there is, and a step is an
    epoch. At a probability of 0 it is LoRA.
    """

    name = "temperature-dropout"
    source = "NeurIPS 2024, doi 10.52202/079017-3694, adapted to the target alone"
    family = "source-trained"
    presets: ClassVar = LoRA.presets
    shown_fields: ClassVar[tuple[str, ...]] = ("temperature_dropout",)

    temperature_dropout: float = fields.real(
        0.8,
        "Probability of a block's attention scores being 0 in a training step, in [0, 1).",
        least=0,
        below=1,
    )

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        from tir_kernels.adapters import add_temperature_dropout

        with self.adapted(kit) as lora:
            if not self.temperature_dropout:
                yield TunedTowers(self, kit, lora)
                return
            with add_temperature_dropout(
                kit.model, self.temperature_dropout, kit.seeds, kit.backend
            ) as noise:
                yield NoisyTowers(self, kit, lora, noise)


class NoisyTowers(TunedTowers):
    """Towers with LoRA, whose image tower has noise in training."""

    leaves_images_to_lora = False

    def __init__(
        self,
        method: LoRA,
        kit: Kit,
        lora: Adapter,
        noise: TemperatureDropoutHandle | RandomRegisters,
    ) -> None:
        super().__init__(method, kit, lora)
        self.noise = noise

    def train(self, mode: bool) -> None:
        super().train(mode)
        self.noise.train(mode)

    def next_step(self) -> None:
        super().next_step()
        self.noise.next_step()
