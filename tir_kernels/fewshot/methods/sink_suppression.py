"""Sink suppression: a frozen tower whose most attended patches are turned down."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.changed_tower import ChangedTower
from tir_kernels.fewshot.methods.protocol import Kit
from tir_kernels.fewshot.methods.sinks import make_sinks, num_sinks_field, sinks_field
from tir_kernels.rules import PLACEMENTS


@dataclass(frozen=True)
class SinkSuppression(ChangedTower):
    """Zero-shot CLIP with one weight on the patches that receive most attention; no text is read.

    The control for methods that turn patches down by the classes: the same blocks, without text.
    With sinks "random" as many patches are drawn, which is the control for this one.
    """

    name = "sink-suppression"
    source = "a control, of no paper"
    shown_fields: ClassVar[tuple[str, ...]] = ("sinks", "num_sinks", "sink_weight")

    sink_weight: float = fields.real(0.0, "Weight of the sinks; at 1 nothing changes.")
    sinks: str = sinks_field("attention")
    num_sinks: int = num_sinks_field()
    layers: tuple[int, ...] | None = fields.whole_list(
        None, "Vision blocks that are changed; unset means depth - 4 and depth - 2."
    )
    placement: str = fields.choice("attention", PLACEMENTS, "Where the weights act, as in tir.")

    def change(self, kit: Kit) -> AbstractContextManager[Any]:
        from tir_kernels.adapters import add_sink_suppression

        if self.sink_weight == 1:
            return nullcontext()
        return add_sink_suppression(
            kit.model,
            make_sinks(self.sinks, self.num_sinks, kit),
            self.sink_weight,
            self.layers,
            self.placement,
            kit.backend,
        )

    def inputs_kind(self, kit: Kit) -> str | None:
        return None if self.sinks == "random" else super().inputs_kind(kit)
