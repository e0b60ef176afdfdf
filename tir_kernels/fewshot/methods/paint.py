"""PAINT on an image tower: its class token attends more to chosen patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.changed_tower import ChangedFeatures, ChangedTower
from tir_kernels.fewshot.methods.protocol import Kit, Learner

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.adapters.informed_tokens import PayingAttention


@dataclass(frozen=True)
class Paint(ChangedTower):
    """Zero-shot CLIP whose class token attends more to informed patches (PAINT).

    Scores a of the class token's query become ``a + gain |a|``. Summary tokens are patches above
    Q3 + 1.5 (Q3 - Q1) of the class token's attention in the last block but one, local tokens the
    quarter most attended in the first block, both by the tower as it is. The published method
    changes a language model's scores for these patches; here those of the image tower itself.
    """

    name = "paint"
    source = "github.com/hasanar1f/PAINT, for a language model"
    shown_fields: ClassVar[tuple[str, ...]] = ("local_gain", "summary_gain")

    local_gain: float = fields.real(0.7, "Gain of the local tokens' scores.")
    summary_gain: float = fields.real(0.3, "Gain of the summary tokens' scores.")
    local_share: float = fields.real(
        0.25, "Share of the patches that are local tokens, in [0, 1], but for summary tokens."
    )
    layers: tuple[int, ...] | None = fields.whole_list(
        None, "Vision blocks that are changed; unset means all from block 2 on."
    )

    def __post_init__(self) -> None:
        from tir_kernels.rules import ratio

        super().__post_init__()
        ratio("local_share", self.local_share)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        with self.change(kit) as handle:
            yield _Informed(self, kit, handle)

    def change(self, kit: Kit) -> AbstractContextManager[PayingAttention | None]:
        from tir_kernels.adapters import add_paying_attention

        if self.local_gain == self.summary_gain == 0:
            return nullcontext()
        gains = self.local_gain, self.summary_gain
        return add_paying_attention(kit.model, *gains, self.layers, kit.backend)


class _Informed(ChangedFeatures):
    def __init__(self, method: Paint, kit: Kit, handle: PayingAttention | None) -> None:
        super().__init__(method, kit, method.inputs_kind(kit))
        self._model, self._handle, self._share = kit.model, handle, method.local_share

    def inputs(self, images: Tensor) -> Tensor:
        from tir_kernels.adapters import informed_tokens

        if self._handle is None:
            return super().inputs(images)
        tokens = self._encoder.embed(images.flatten(0, 1))
        self._handle.set_tokens(None)
        self._handle.set_tokens(informed_tokens(self._model, tokens, self._share))
        features = self._encoder.features(tokens).unflatten(0, images.shape[:2])
        self._handle.set_tokens(None)
        return features
