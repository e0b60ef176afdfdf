"""Trainings that go on where they stopped, to the same bits; and steps of a part of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tir_kernels.fewshot.episode import random_state
from tir_kernels.fewshot.methods import Learner
from tir_kernels.fewshot.train.graph import LossLog


class SavedTraining(Protocol):
    """A keeper of an unfinished training's state."""

    def load(self) -> dict[str, Any] | None:
        """The state that was kept last, if there is one."""

    def is_due(self) -> bool:
        """Whether the state is to be kept now; behind the last step it is in any case."""

    def keep(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the one before."""


class TrainingState:
    """All that the steps of a training change, as tensors and numbers.

    Random numbers need no place in it: a learner's depend on its seed and the number of the step.
    """

    def __init__(
        self,
        learner: Learner,
        optimizers: Sequence[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        log: LossLog,
    ) -> None:
        self._learner, self._optimizers = learner, optimizers
        self._scaler, self._log = scaler, log
        self._parameters = [each for group in learner.parameters() for each in group.parameters]

    def take(self, step: int) -> dict[str, Any]:
        """The state after so many steps."""
        return {
            "step": step,
            "losses": [list(own) for own in self._log.finish()],
            "parameters": [parameter.detach().cpu() for parameter in self._parameters],
            "carried": [each.detach().cpu() for each in self._learner.carried()],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "scaler": self._scaler.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> int:
        """Go back to a state that was taken; gives the number of steps it had taken."""
        for parameter, value in zip(self._parameters, state["parameters"], strict=True):
            parameter.copy_(value)
        for optimizer, settings in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(settings)
        self._scaler.load_state_dict(state["scaler"])
        self._log.resume(state["losses"])
        step: int = state["step"]
        for _ in range(step):
            self._learner.next_step()
        for tensor, value in zip(self._learner.carried(), state.get("carried", ()), strict=True):
            tensor.copy_(value)
        return step


def batch_order(
    labels: Tensor, size: int | None, seed: int, steps: int, is_balanced: bool = False
) -> Tensor | None:
    """The positions (steps, B) of the images that each step sees.

    Args:
        labels: (S,) of all images.
        size: B images of each step, in an order drawn from the seed; ``None``, or S and more where
            no classes are balanced: all at every step, for which there is no order.
        seed: Seed of the run.
        steps: Steps of the training.
        is_balanced: Draw from the classes in turn, whatever their sizes, so that over the steps
            each is seen as often as any other, up to one image; within a class every image comes
            once before any comes again. Otherwise that holds for all images together.
    """
    count = len(labels)
    if size is None or (size >= count and not is_balanced):
        return None
    random = random_state(seed, 0, stream=3)
    owners = labels.cpu().numpy()
    if not is_balanced:
        order = _rounds(random, np.arange(count), steps * size)
    else:
        classes = _rounds(random, np.unique(owners), steps * size)
        order = np.empty_like(classes)
        for label in np.unique(owners):
            places = np.flatnonzero(classes == label)
            order[places] = _rounds(random, np.flatnonzero(owners == label), len(places))
    return torch.from_numpy(order.reshape(steps, size)).to(labels.device)


def _rounds(random: np.random.RandomState, items: np.ndarray, length: int) -> np.ndarray:
    """So many items, each once in an order of its own before any comes again."""
    rounds = [random.permutation(len(items)) for _ in range(-(-length // len(items)))]
    return items[np.concatenate([*rounds, np.empty(0, np.int64)])[:length]]


class Batches:
    """The part of the support images that a step sees, always in the same two tensors.

    Args:
        inputs: (G, S, ...) of all images.
        labels: (G, S).
        order: (steps, B) positions of the images of each step; ``None``: all at every step.

    Attributes:
        inputs, labels: (G, B, ...) and (G, B) of the step that was shown last.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, order: Tensor | None) -> None:
        self.inputs, self.labels = inputs, labels
        self._order = order
        if order is not None:
            self._all_inputs, self._all_labels = inputs, labels
            self.inputs, self.labels = (each[:, order[0]] for each in (inputs, labels))

    def show(self, step: int) -> None:
        """Let the tensors hold the images of a step, counted from 0."""
        if self._order is not None:
            self.inputs.copy_(self._all_inputs[:, self._order[step]])
            self.labels.copy_(self._all_labels[:, self._order[step]])
