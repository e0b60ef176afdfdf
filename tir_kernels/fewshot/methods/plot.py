"""PLOT: several learned prompts a class, matched with an image's patches by optimal transport."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.learned_prompts import ContextLearner, LearnedPrompts
from tir_kernels.fewshot.methods.option_fields import context_rate, context_tokens
from tir_kernels.fewshot.methods.protocol import Kit, Learner
from tir_kernels.fewshot.methods.templates import single_template

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 0.1  # of the entropy, beside costs from 0 to 2
MOST_ITERATIONS = 100
THRESHOLD = 1e-2  # of the mean change of the rows' factors


@dataclass(frozen=True)
class PLOT(LearnedPrompts):
    """PLOT: several learned contexts a class, transported onto an image's patches; towers frozen.

    ``logits = logit_scale sum(T * S)`` with the cosines S of an image's patches and a class's N
    prompts, and the plan T that moves uniform weights of the patches to those of the prompts at
    cost 1 - S with an entropy of 0.1, by Sinkhorn's iterations. No gradient flows through T. The
    contexts, shared by the classes, start as random vectors, since equal ones would stay equal.

    Steps are full-batch, by SGD as in CoOp, 100 at any number of shots. The published program stops
    the iterations where the mean change of a whole batch is below 1e-2; here each image and class
    stops at its own, so that no other image plays a part. It leaves out steps with NaN, which
    logarithms never give.
    """

    name = "plot"
    source = "arXiv 2210.01253"

    prompts_per_class: int = fields.whole(
        4,
        "Learned prompts of each class.",
        least=1,
        most=1000,
        reason="an image has hardly more patches",
    )
    context_tokens: int = context_tokens(16, "Vectors of each learned context, from N(0, 0.02²).")
    context_lr: float = context_rate("the contexts")

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Transported(self, kit)


class _Transported(ContextLearner):
    """Inputs are features of patches (G, S, patches E), flat since they enter no block."""

    inputs_kind = "patch features"

    def __init__(self, method: PLOT, kit: Kit) -> None:
        from torch import nn

        from tir_kernels.fewshot.methods.prompts import Prompts, drawn_vectors, generators_of

        self._method, self._encoder = method, kit.encoder
        count = method.context_tokens
        self._prompts = Prompts.of_kit(kit, count, single_template(method.template))
        words = self._prompts.vectors.detach()
        shape = (method.prompts_per_class, 1, count, words.shape[2])
        self._contexts = nn.Parameter(drawn_vectors(generators_of(kit), *shape).to(words))

    def inputs(self, images: Tensor) -> Tensor:
        tokens = self._encoder.embed(images.flatten(0, 1))
        return self._encoder.patch_features(tokens).flatten(1).unflatten(0, images.shape[:2])

    def classes(self) -> Tensor:
        """(G, N, C, E) embeddings of all prompts, of unit length."""
        from torch.nn.functional import normalize

        return normalize(self._prompts.encode(self._contexts).float(), dim=-1)

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        import torch
        from torch.nn.functional import normalize

        # A plan follows from exponentials of ten times the cosines: too sharp for 16 bits.
        with torch.autocast(inputs.device.type, enabled=False):
            patches = inputs.float().unflatten(-1, (-1, classes.shape[-1]))
            patches = normalize(patches, dim=-1)
            cosines = torch.einsum("gsme,gnce->gscmn", patches, classes)
            plan = transport(cosines.detach())
            return self._method.logit_scale * (plan * cosines).sum((-2, -1))


def transport(cosines: Tensor) -> Tensor:
    """(..., M, N) float32 cosines -> plans of the same shape, whose columns sum to 1 / N.

    Rows sum to about 1 / M, by as much as the iterations still changed. Each plan has its own end,
    behind which iterations change nothing: a GPU, which nobody may wait for, runs them all.
    """
    import torch

    kernel = (cosines - 1) / EPSILON  # logarithms, as all that follows
    rows = torch.zeros_like(kernel[..., :1])
    columns = torch.zeros_like(kernel[..., :1, :])
    goes_on = torch.ones_like(rows[..., :1, :], dtype=torch.bool)
    for _ in range(MOST_ITERATIONS):
        new_rows = -math.log(kernel.shape[-2]) - (kernel + columns).logsumexp(-1, True)
        new_columns = -math.log(kernel.shape[-1]) - (kernel + new_rows).logsumexp(-2, True)
        change = (new_rows.exp() - rows.exp()).abs().mean(-2, True)
        rows = torch.where(goes_on, new_rows, rows)
        columns = torch.where(goes_on, new_columns, columns)
        goes_on = goes_on & ~(change < THRESHOLD)
        if may_wait_for(goes_on) and not goes_on.any():
            break
    return (kernel + rows + columns).exp()


def may_wait_for(tensor: Tensor) -> bool:
    """Whether numbers may be looked at while they are made: those on a CPU."""
    return tensor.device.type == "cpu"
