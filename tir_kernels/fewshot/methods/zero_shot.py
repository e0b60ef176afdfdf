"""Zero-shot classification: the model as it is, with prompts such as "a photo of a {}."."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import FrozenImages
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method
from tir_kernels.fewshot.methods.templates import templates

if TYPE_CHECKING:
    from torch import Tensor

LOGIT_SCALE_HELP = "Factor of the cosine in the logits; unset: 4, or 2 for one shot."
TEMPLATE_HELP = (
    'Prompt, with {} for the class\'s words, in place of "a photo of a {}."; known: the one '
    "published for the data set whose classes these are. A learned context starts as the words in "
    "front of {}, which must be as many tokens as the context has vectors. Methods that train no "
    "prompt take it several times: a class is the mean of its prompts' embeddings of unit length."
)


@dataclass(frozen=True)
class ZeroShot(Method):
    """Zero-shot CLIP: nothing is trained."""

    name = "zero-shot"
    source = "arXiv 2103.00020"
    family = "frozen features"

    logit_scale: float | None = fields.real(None, LOGIT_SCALE_HELP)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield FrozenFeatures(kit, self.logit_scale, self.template)


class FrozenFeatures(FrozenImages):
    """Cosines of the tower's own image features with the class prompts' embeddings.

    Args:
        kit: The parts of the episodes.
        logit_scale: Factor of the cosines; ``None``: that published for so many shots.
        template: The prompts' words; ``None``: "a photo of a {}.".
        reads_texts: Whether there are prompts at all; without them the model may have no texts.
    """

    def __init__(
        self,
        kit: Kit,
        logit_scale: float | None,
        template: tuple[str, ...] | None = None,
        reads_texts: bool = True,
    ) -> None:
        from tir_kernels.fewshot.methods.prompts import Prompts, default_logit_scale

        super().__init__(kit)
        words = (template or (None,)) if reads_texts else ()
        self._prompts = [Prompts.of_kit(kit, 0, each) for each in words]
        self._logit_scale = default_logit_scale(logit_scale, kit.shots)
        self._texts: Tensor | None = None

    def texts(self) -> Tensor:
        """(G, C, E) embeddings of the class prompts, of unit length, made once."""
        import torch
        from torch.nn.functional import normalize

        if self._texts is None:
            with torch.no_grad():
                embeddings = [normalize(each()[0].float(), dim=-1) for each in self._prompts]
                self._texts = embeddings[0]
                if len(embeddings) > 1:
                    self._texts = normalize(torch.stack(embeddings).mean(0), dim=-1)
        return self._texts

    def classes(self) -> Any:
        """(G, C, E) class embeddings of unit length."""
        return self.texts()

    def show_classes(self, classes: Any) -> Tensor:
        return classes

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from tir_kernels.fewshot.methods.prompts import cosine_logits

        return cosine_logits(inputs, classes, self._logit_scale)
