"""Dynamic token re-weighting on top of LoRA and a learned prompt context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import centroids
from tir_kernels.fewshot.methods.lora import PAPER, PROGRAM, LoRA, TunedTowers
from tir_kernels.fewshot.methods.protocol import Kit, Learner
from tir_kernels.rules import PLACEMENTS, RULES, WeightRule

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters import LoRA as Adapter
    from tir_kernels.adapters import Reweighting
    from tir_kernels.adapters.selection import PatchOrder

RELEVANCES = ("text", "centroids")
SELECTIONS = ("relevance", "attention", "random")
REWEIGHTING = {
    "top_ratio": 0.3,
    "strength": 0.5,
    "rule": "linear",
    "layers": None,
    "placement": "tokens",
    "relevance": "text",
    "selection": "relevance",
}


@dataclass(frozen=True)
class TIR(LoRA):
    """LoRA and a prompt context, with patch tokens turned up or down by how many classes pick them.

    The class embeddings of text block ``text_layer`` decide which tokens are picked; with relevance
    "centroids", those are the classes' centroids: for each class the mean of its support images'
    features (of all views, each of unit length, by the tower as it is before the first step,
    without weights), again of unit length. Centroids stay as they are while the tower is trained.

    With a selection other than "relevance", each image's counts and weights are those of relevance,
    but given to other patches: the highest count to the most attended patch of that block, and so
    on down; or in an order drawn from the episode's seed, one for each block.
    """

    name = "tir"
    source = "arXiv 2605.25799"
    presets: ClassVar = {
        "paper": {"steps": 100, **PAPER, **REWEIGHTING},
        "program": {**PROGRAM, **REWEIGHTING},
    }

    top_ratio: float = fields.real(0.3, "Share of the patch tokens each class selects, in [0, 1].")
    strength: float = fields.real(0.5, "β of the weight rule.")
    rule: str = fields.choice("linear", RULES, "Kind of weight rule.")
    layers: tuple[int, ...] | None = fields.whole_list(
        None, "Vision blocks that are re-weighted; unset means depth - 4 and depth - 2."
    )
    placement: str = fields.choice(
        "tokens",
        PLACEMENTS,
        '"tokens" (the published method), "attention" (in the softmax), "both", or "values" (of '
        "the attention, whose softmax stays as it is).",
    )
    text_layer: int | None = fields.whole(
        None, "Text block whose class embeddings give the relevance; unset: depth - 2."
    )

    relevance: str = fields.added_later(
        fields.choice(
            "text",
            RELEVANCES,
            'Class embeddings that relevance is taken to: "text", or "centroids" of the support.',
        )
    )
    selection: str = fields.added_later(
        fields.choice(
            "relevance",
            SELECTIONS,
            'Patches that get the weights: "relevance" selects them; as controls, as many with the '
            'same weights are the most attended ("attention") or "random".',
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weight_rule()

    def weight_rule(self) -> WeightRule:
        """The rule that the options describe."""
        return WeightRule(self.rule, self.strength, top_ratio=self.top_ratio)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        from tir_kernels.adapters import MostAttended, RandomOrder, add_reweighting

        order: PatchOrder | None = None
        if self.selection != "relevance":
            order = MostAttended() if self.selection == "attention" else RandomOrder(kit.seeds)
        with (
            self.adapted(kit) as lora,
            add_reweighting(
                kit.model,
                self.layers,
                self.placement,
                self.weight_rule(),
                kit.backend,
                order=order,
            ) as reweighting,
        ):
            yield _Reweighted(self, kit, lora, reweighting)


class _Reweighted(TunedTowers):
    leaves_images_to_lora = False
    joins_late = True

    def __init__(self, method: TIR, kit: Kit, lora: Adapter, reweighting: Reweighting) -> None:
        super().__init__(method, kit, lora)
        self.reweighting = reweighting
        self._text_layer = _resolve_text_layer(method.text_layer, self.prompts.num_blocks)
        self._num_classes = len(kit.class_names[0])
        self._by_centroids = method.relevance == "centroids"
        self._centroids: Tensor | None = None

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Take the centroids, if those decide."""
        if self._by_centroids:
            with self.reweighting.suspended():
                features = self._encoder.features(inputs.flatten(0, 1))
            features = features.unflatten(0, inputs.shape[:2])
            self._centroids = centroids(features, labels, self._num_classes)

    def trained(self) -> dict[str, Tensor]:
        """As of LoRA; and "centroids" (G, C, E), if those decide."""
        own = {} if self._centroids is None else {"centroids": self._centroids}
        return super().trained() | own

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        super().restore(trained)
        if self._by_centroids:
            self._centroids = trained["centroids"].to(self.prompts.vectors.device)

    def classes(self) -> Any:
        """Class embeddings (G, C, E): of unit length for the logits, and for the relevance."""
        from torch.nn.functional import normalize

        final, intermediate = self.texts(self._text_layer)
        deciding = self._centroids if self._by_centroids else intermediate
        return normalize(final.float(), dim=-1), deciding

    def show_classes(self, classes: Any) -> Tensor:
        final, deciding = classes
        ready = self.beside.join if self.beside.is_under_way else None
        self.reweighting.set_class_embeddings(deciding, ready)
        return final

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        return super().logits(inputs, self.show_classes(classes))


def _resolve_text_layer(layer: int | None, depth: int) -> int:
    if layer is None:
        return max(depth - 2, 0)
    if not -depth <= layer < depth:
        raise ValueError(f"text_layer must lie between 0 and {depth - 1}; got {layer}")
    return layer % depth
