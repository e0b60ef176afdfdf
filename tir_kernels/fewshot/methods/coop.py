"""CoOp: a learned prompt context, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.frozen_images import FrozenImages
from tir_kernels.fewshot.methods.learned_prompts import ContextLearner, LearnedPrompts
from tir_kernels.fewshot.methods.option_fields import context_rate, context_tokens
from tir_kernels.fewshot.methods.protocol import Kit, Learner
from tir_kernels.fewshot.methods.templates import single_template

if TYPE_CHECKING:
    from torch import Tensor

STARTS = ("words", "random")
SCOPES = ("shared", "per-class")


@dataclass(frozen=True)
class CoOp(LearnedPrompts):
    """CoOp: a learned context in front of the classes' names; both towers stay frozen.

    ``logits = logit_scale f t(v)ᵀ`` with the text tower's t for "{v} {name}." and the image
    features f, which are made once. Steps are full-batch: SGD with momentum 0.9, weight decay 5e-4,
    the first step at a rate of 1e-5 and a cosine behind it. The published program takes 50 epochs
    at 1 shot, 100 at 2 and 4, and 200 at 8 and 16, in batches of 32 of a whole data set's classes;
    with a few classes one epoch is one such step or a few. 100 is what the program of arXiv
    2605.25799 takes at any number of shots, and LoRA here. The published default is a context of 16
    random vectors, ``context_tokens=16, context_start="random"``.
    """

    name = "coop"
    source = "arXiv 2109.01134"

    context_tokens: int = context_tokens(4, "Learned prompt context vectors.")
    context_start: str = fields.choice(
        "words",
        STARTS,
        'Start of the context: "words", as "a photo of a" or the words of the template, or '
        '"random", from N(0, 0.02²).',
    )
    context_scope: str = fields.choice(
        "shared", SCOPES, 'A context "shared" by the classes, or one "per-class".'
    )
    context_lr: float = context_rate("the context")

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Context(self, kit)


class _Context(ContextLearner, FrozenImages):
    def __init__(self, method: CoOp, kit: Kit) -> None:
        from torch import nn

        from tir_kernels.fewshot.methods.prompts import Prompts, drawn_vectors, generators_of

        super().__init__(kit)
        self._method = method
        self._prompts = Prompts.of_kit(kit, method.context_tokens, single_template(method.template))
        words = self._prompts.vectors.detach()  # (G, M, W)
        contexts = len(kit.class_names[0]) if method.context_scope == "per-class" else 1
        start = words[:, None].repeat(1, contexts, 1, 1)
        if method.context_start == "random":
            start = drawn_vectors(generators_of(kit), *start.shape[1:]).to(words)
        self._contexts = nn.Parameter(start)  # (G, C, M, W), C = 1 for one that is shared

    def classes(self) -> Tensor:
        """(G, C, E) class embeddings of unit length."""
        from torch.nn.functional import normalize

        return normalize(self._prompts.encode(self._contexts[:, None])[:, 0].float(), dim=-1)

    def show_classes(self, classes: Any) -> Tensor:
        return classes

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        from tir_kernels.fewshot.methods.prompts import cosine_logits

        return cosine_logits(inputs, classes, self._method.logit_scale)
