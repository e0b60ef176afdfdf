"""Sink redistribution: a frozen tower whose sinks pass on a part of their attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.changed_tower import ChangedTower
from tir_kernels.fewshot.methods.protocol import Kit
from tir_kernels.fewshot.methods.sinks import make_sinks, num_sinks_field, sinks_field


@dataclass(frozen=True)
class SinkRedistribution(ChangedTower):
    """Zero-shot CLIP whose attention sinks keep a part p of their attention (VAR).

    ``p O + (1 - p) R``, with O the attention as it is and R that without the sinks, in every query
    of every head that gives the sinks a share of 0.5 at most. The published method is for language
    models that see images: there sinks are found by known dimensions of their activations, and
    queries that give images less than 0.2 of their attention are left alone. In an image tower all
    keys are the image's, so that floor has no meaning; sinks are found by their norm, since
    its test |x_d| > 20 rms(x) can hardly be met by tokens of some hundred dimensions.
    """

    name = "sink-redistribution"
    source = "arXiv 2503.03321, for a language model"
    shown_fields: ClassVar[tuple[str, ...]] = ("sinks", "kept_share")

    kept_share: float = fields.real(
        0.6, "p, the part of its attention that a sink keeps, in [0, 1]; at 1 nothing changes."
    )
    most_share: float = fields.real(
        0.5, "Queries of a head that give sinks more than this share stay as they are, in [0, 1]."
    )
    sinks: str = sinks_field("norm")
    num_sinks: int = num_sinks_field()
    layers: tuple[int, ...] | None = fields.whole_list(
        None, "Vision blocks that are changed; unset means all from block 2 on but the last."
    )

    def __post_init__(self) -> None:
        from tir_kernels.rules import ratio

        super().__post_init__()
        ratio("kept_share", self.kept_share)
        ratio("most_share", self.most_share)

    def change(self, kit: Kit) -> AbstractContextManager[Any]:
        from tir_kernels.adapters import add_sink_redistribution

        if self.kept_share == 1:
            return nullcontext()
        sinks = make_sinks(self.sinks, self.num_sinks, kit)
        shares = self.kept_share, self.most_share
        return add_sink_redistribution(kit.model, sinks, *shares, self.layers, kit.backend)

    def inputs_kind(self, kit: Kit) -> str | None:
        return None if self.sinks == "random" else super().inputs_kind(kit)
