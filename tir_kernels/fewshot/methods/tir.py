"""Dynamic token re-weighting on top of LoRA and a learned prompt context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.lora import LoRA, TunedTowers
from tir_kernels.fewshot.methods.protocol import Kit, Learner
from tir_kernels.rules import PLACEMENTS, RULES, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import LoRA as Adapter
    from tir_kernels.adapters import Reweighting


@dataclass(frozen=True)
class TIR(LoRA):
    """LoRA and a prompt context, with patch tokens turned up or down by how many classes pick them.

    The class embeddings of text block ``text_layer`` decide which tokens are picked.
    """

    name = "tir"
    source = "arXiv 2605.25799"

    top_ratio: float = fields.real(0.3, "Share of the patch tokens each class selects, in [0, 1].")
    strength: float = fields.real(0.5, "β of the weight rule.")
    rule: str = fields.choice("linear", RULES, "Kind of weight rule.")
    layers: tuple[int, ...] | None = fields.whole_list(
        None, "Vision blocks that are re-weighted; unset means depth - 4 and depth - 2."
    )
    placement: str = fields.choice(
        "tokens", PLACEMENTS, '"tokens" (the published method), "attention" or "both".'
    )
    text_layer: int | None = fields.whole(
        None, "Text block whose class embeddings give the relevance; unset: depth - 2."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight_rule()

    def weight_rule(self) -> WeightRule:
        """The rule that the options describe."""
        return WeightRule(self.rule, self.strength, top_ratio=self.top_ratio)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        from tir_kernels.adapters import add_reweighting

        with (
            self.adapted(kit) as lora,
            add_reweighting(
                kit.model, self.layers, self.placement, self.weight_rule(), kit.backend
            ) as reweighting,
        ):
            yield _Reweighted(self, kit, lora, reweighting)


class _Reweighted(TunedTowers):
    def __init__(self, method: TIR, kit: Kit, lora: Adapter, reweighting: Reweighting) -> None:
        super().__init__(method, kit, lora)
        self.reweighting = reweighting
        self._text_layer = _resolve_text_layer(method.text_layer, self.prompts.num_blocks)

    def classes(self) -> Any:
        """Class embeddings (G, C, E): of unit length for the logits, and for the relevance."""
        from torch.nn.functional import normalize

        final, intermediate = self.prompts(self._text_layer)
        return normalize(final.float(), dim=-1), intermediate

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        final, intermediate = classes
        self.reweighting.set_class_embeddings(intermediate)
        return super().logits(inputs, final)


def _resolve_text_layer(layer: int | None, depth: int) -> int:
    if layer is None:
        return max(depth - 2, 0)
    if not -depth <= layer < depth:
        raise ValueError(f"text_layer must lie between 0 and {depth - 1}; got {layer}")
    return layer % depth
