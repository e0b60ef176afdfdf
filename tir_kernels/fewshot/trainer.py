"""The model of a run, and the way in which episodes are trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Method, Observer
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.train import loop
from tir_kernels.fewshot.train.batch import Job
from tir_kernels.fewshot.train.inputs import SharedInputs
from tir_kernels.towers.loading.loaded import LoadedModel


class StepFunction(Protocol):
    """A function that a training calls after each step."""

    def __call__(self, position: int, step: int, loss: float) -> None: ...


class Trainer:
    """Trains episodes on a model.

    Args:
        model: The model.
        seed: Seed of the run.
        runtime: Device and types.
    """

    def __init__(self, model: LoadedModel, seed: int, runtime: Runtime) -> None:
        self._model = model
        self._seed = seed
        self._runtime = replace(runtime, parallel=None)
        self._shared = SharedInputs()

    def train(
        self,
        episodes: list[Episode],
        method: Method,
        on_step: StepFunction,
        observers: Sequence[Observer] = (),
    ) -> list[Any]:
        """Train on several episodes at once.

        Args:
            episodes: Episodes to train on.
            method: An arm's method.
            on_step: Function called with an episode's position, a step from 0, and its loss.
            observers: Listeners between steps.

        Returns:
            For each episode an object with ``query_logits``, ``losses`` and ``support_accuracy``,
            or the exception where its loss became NaN or infinite.
        """
        self._shared.keep_only(episodes)
        job = Job(
            self._model.model,
            self._model.tokenizer,
            method,
            self._seed,
            self._runtime,
            observers,
            shared=self._shared,
        )
        return loop.finetune(job, episodes, on_step)

    def fitting(self, episode: Episode, method: Method) -> int | None:
        """The number of such episodes that memory has room for at once.

        Returns:
            At least 1, or ``None`` where nothing is trained.
        """
        if not method.steps:
            return None
        model, tokenizer = self._model.model, self._model.tokenizer
        return loop.episodes_that_fit(model, tokenizer, episode, method, self._runtime)
