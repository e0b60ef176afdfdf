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
        """Whether the state is to be kept now."""

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
        return step


class Batches:
    """The part of the support images that a step sees, always in the same two tensors.

    Args:
        inputs: (G, S, ...) of all images.
        labels: (G, S).
        size: B images of each step, every image once before any comes again, in an order drawn from
            the seed; ``None``, or S and more: all of them at every step.
        seed: Seed of the run.
        steps: Steps of the training.

    Attributes:
        inputs, labels: (G, B, ...) and (G, B) of the step that was shown last.
    """

    def __init__(
        self, inputs: Tensor, labels: Tensor, size: int | None, seed: int, steps: int
    ) -> None:
        self.inputs, self.labels = inputs, labels
        count = labels.shape[1]
        self._order: Tensor | None = None
        if size is None or size >= count:
            return
        random = random_state(seed, 0, stream=3)
        rounds = [random.permutation(count) for _ in range(-(-steps * size // count))]
        order = np.concatenate(rounds)[: steps * size].reshape(steps, size)
        self._order = torch.from_numpy(order).to(labels.device)
        self._all_inputs, self._all_labels = inputs, labels
        self.inputs, self.labels = (each[:, :size].clone() for each in (inputs, labels))

    def show(self, step: int) -> None:
        """Let the tensors hold the images of a step, counted from 0."""
        if self._order is not None:
            self.inputs.copy_(self._all_inputs[:, self._order[step]])
            self.labels.copy_(self._all_labels[:, self._order[step]])
