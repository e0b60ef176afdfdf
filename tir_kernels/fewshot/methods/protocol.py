"""The seam between methods and all that runs them: a method's options, and what it learns with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot.fields import Checked
from tir_kernels.fewshot.methods.families import Described
from tir_kernels.fewshot.methods.kit import Kit, ParameterGroup

if TYPE_CHECKING:
    from torch import Tensor


class Learner:
    """A model with a method's parts for G episodes. Images come as (G, S, 3, H, W)."""

    class_weights: Tensor | None = None  # (C,) of the classes' images; None: all 1
    # Learners whose inputs are of each image alone, and depend on nothing but the model, name what
    # they are, such as "features": then they are computed once for all such learners.
    inputs_kind: str | None = None

    def inputs(self, images: Tensor) -> Tensor:
        """The images' way as far as it is frozen: tokens (G, S, L, D), or features (G, S, E)."""
        raise NotImplementedError

    def classes(self) -> Any:
        """The part of the logits that no image changes: run once a step, and once to classify."""

    def show_classes(self, classes: Any) -> Tensor | None:
        """The (G, C, E) embeddings in the result of ``classes``, shown to the image tower first."""
        return None

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        """(G, S, ...) inputs, and the result of ``classes`` -> (G, S, C) logits."""
        raise NotImplementedError

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Learn in closed form from inputs (G, S, ...) and labels (G, S), before any step."""

    def training_set(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What steps see, or draw from, made of inputs (G, S, ...) and labels (G, S): all of it."""
        return inputs, labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(G,) losses of logits (G, S, C) and labels (G, S): mean weighted cross entropy."""
        from torch.nn.functional import cross_entropy

        weights = self.class_weights
        losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), weights, reduction="none")
        return losses.unflatten(0, labels.shape).mean(1)

    def training_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """(G,) losses of a step, whose gradients are followed; ``loss`` of the logits unless more
        than the logits matters.
        """
        return self.loss(self.logits(inputs, self.classes()), labels)

    def parameters(self) -> Sequence[ParameterGroup]:
        """Everything that is stepped, asked after ``fit``; empty where nothing is."""
        return ()

    def carried(self) -> Sequence[Tensor]:
        """What a step leaves for the next one besides parameters; steps write it in place."""
        return ()

    def train(self, mode: bool) -> None:
        """Switch what differs in training, such as dropout, on or off."""

    def next_step(self) -> None:
        """Draw anew what is random in training, and count; a part of the step, and of its CUDA
        graph. A training that goes on behind n steps calls it n times first.
        """

    def trained(self) -> dict[str, Tensor]:
        """Name -> (G, ...) of all that was learned."""
        return {}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Take what ``trained`` gave, of the right names and shapes, in place of fit and steps."""


@dataclass(frozen=True)
class Method(Described, Checked):
    """A method's options: its fields, made and checked by ``tir_kernels.fewshot.fields``."""

    steps = 0  # of training; a field where they can be chosen
    fit_takes_class_weights = False  # whether a learner's fit heeds them; steps do
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # of its own, see fewshot/presets.py
    needs_all_images = False  # at every step, so that there are no batches of them

    def start(self, kit: Kit) -> AbstractContextManager[Learner]:
        """A learner, whose parts are taken off the model again at the end of the context."""
        raise NotImplementedError
