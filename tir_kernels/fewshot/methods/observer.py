"""The seam between a training and those who look at it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tir_kernels.fewshot.methods.protocol import Learner

if TYPE_CHECKING:
    from torch import Tensor

    from tir_kernels.fewshot.episode import Episode


class Observer:
    """A listener between steps: before the first, each ``every`` steps, and after the last.

    It must change nothing that the learner trains; random numbers it may draw.
    """

    every: int

    def start(self, episodes: Sequence[Episode]) -> None:
        """Take note of the G episodes that are trained at once from now on.

        Where memory did not suffice for so many, some of them are started again.
        """

    def observe(self, step: int, learner: Learner, inputs: Tensor) -> None:
        """Look at a learner that has taken so many steps, in evaluation mode, without gradients.

        Args:
            step: Steps taken.
            learner: The learner of the G episodes.
            inputs: (G, S, ...) of the support images, as ``Learner.inputs`` gives them.
        """
        raise NotImplementedError
