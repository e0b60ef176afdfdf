"""A check of methods before anything is trained: that the model has what each is built on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.methods import Method
from tir_kernels.fewshot.prompt_check import cut_names_are_known
from tir_kernels.fewshot.run_options import setting_first
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.train import loop
from tir_kernels.towers.loading.loaded import LoadedModel


def check_methods(
    loaded: LoadedModel,
    methods: Mapping[str, Method],
    words: Sequence[str],
    shots: int,
    runtime: Runtime,
) -> None:
    """Build each method's learner on a model once, and take it off again.

    Args:
        loaded: The model.
        methods: Name of an arm -> its method.
        words: The words of as many classes as are told apart at once.
        shots: Labelled images of each.
        runtime: Device and types.

    Raises:
        FewShotError: The model has no such layer, no room for the prompts, no attention that takes
            LoRA or the like; the text names the arm and the setting.
    """
    for name, method in methods.items():
        try:
            # A lack of memory is explained where one trains.
            with cut_names_are_known(), suppress(torch.OutOfMemoryError):
                loop.require_parts(loaded.model, loaded.tokenizer, method, words, shots, runtime)
        except (ValueError, TypeError) as error:
            raise FewShotError(f"{name}: {setting_first(first_line(error))}") from error
