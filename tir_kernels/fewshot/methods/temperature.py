"""Attention temperature: a frozen tower whose attention scores are scaled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.changed_tower import ChangedTower
from tir_kernels.fewshot.methods.protocol import Kit


@dataclass(frozen=True)
class AttentionTemperature(ChangedTower):
    """Zero-shot CLIP with attention scores times T in the image tower's blocks; 0 is uniform.

    ``A = softmax(T scale q . k)``. The paper trains on a source domain under it; here it acts on
    the frozen tower alone.
    """

    name = "attention-temperature"
    source = "NeurIPS 2024, doi 10.52202/079017-3694, without its training"
    shown_fields: ClassVar[tuple[str, ...]] = ("attention_temperature",)

    attention_temperature: float = fields.real(
        0.5, "T, by which attention scores are multiplied; at 0 all tokens attend alike.", least=0
    )
    layers: tuple[int, ...] | None = fields.whole_list(
        None, "Vision blocks that are changed; unset means all."
    )

    def change(self, kit: Kit) -> AbstractContextManager[Any]:
        from tir_kernels.adapters import add_attention_temperature

        if self.attention_temperature == 1:
            return nullcontext()
        return add_attention_temperature(
            kit.model, self.attention_temperature, self.layers, kit.backend
        )
