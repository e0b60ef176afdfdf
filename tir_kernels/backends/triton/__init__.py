"""The operators as Triton kernels, for CUDA devices of capability 8.0 and newer.

Nothing here imports Triton before a question is asked that needs it. Under ``TRITON_INTERPRET=1``
the kernels run on the CPU, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..common import KERNEL_DTYPES, reason_of_all
from ..inputs import AttentionInputs, BackwardInputs, RelevanceInputs, StatisticsInputs
from ..optional import DropoutInputs
from ..protocol import AttentionStatistics, Gradients, Pair
from .configs import MAX_HEAD_DIM

MIN_CAPABILITY = (8, 0)


def interpreter_is_on() -> bool:
    """Whether Triton interprets kernels instead of compiling them, by Triton's own reading."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _card_reason(index: int | None) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability >= MIN_CAPABILITY:
        return ""
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability "
        f"{capability[0]}.{capability[1]}, and at least "
        f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} is needed; use the reference backend"
    )


@functools.cache
def _kernels(operation: str) -> ModuleType:
    """The module that launches the kernels of an operation; importing it imports Triton."""
    return importlib.import_module(f".kernels.{operation}", __name__)


class TritonBackend:
    """Triton kernels for tensors on GPUs of capability 8.0 and newer."""

    name = "triton"
    max_head_dim = MAX_HEAD_DIM
    dtypes = KERNEL_DTYPES

    def unavailable(self) -> str:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton (Linux)"
        if interpreter_is_on():
            return ""
        if not torch.cuda.is_available():
            return (
                "no CUDA device is visible to PyTorch; use the cpu backend, or set "
                "TRITON_INTERPRET=1 to run the kernels slowly on the CPU"
            )
        return reason_of_all(_card_reason)

    def refusal(self, device: torch.device) -> str:
        if interpreter_is_on() and device.type in ("cpu", "cuda"):
            return ""
        if device.type == "cuda":
            return _card_reason(device.index)
        return (
            f"Triton kernels run on CUDA tensors, not on {device.type!r}; use another backend there"
        )

    def relevance(self, inputs: RelevanceInputs) -> Tensor:
        return _kernels("relevance").relevance(*inputs)

    def token_weights(self, inputs: RelevanceInputs, table: Tensor, top_k: int) -> Pair:
        scores = self.relevance(inputs)
        return _kernels("selection").select_and_weigh(
            scores, table, top_k, inputs.num_prefix_tokens
        )

    def attention_forward(self, inputs: AttentionInputs) -> Pair:
        return _kernels("attention_forward").attention_forward(inputs)

    def attention_backward(self, inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
        return _kernels("attention_backward").attention_backward(inputs, backward)

    def attention_statistics(self, inputs: StatisticsInputs) -> AttentionStatistics:
        return _kernels("attention_statistics").attention_statistics(inputs)

    def philox_dropout(self, inputs: DropoutInputs, output: Tensor) -> None:
        _kernels("dropout").philox_dropout(*inputs, output)

    def dropped_product(self, inputs: DropoutInputs, factor: Tensor, output: Tensor) -> bool:
        kernels = _kernels("dropped_product")
        if output.shape[-1] > kernels.MAX_RANK:
            return False
        kernels.dropped_product(inputs, factor, output)
        return True

    def factor_gradient(self, inputs: DropoutInputs, grad: Tensor, output: Tensor) -> bool:
        kernels = _kernels("dropped_product")
        if grad.shape[-1] > kernels.MAX_RANK:
            return False
        kernels.factor_gradient(inputs, grad, output)
        return True

    def add_norm(self, *arguments: Any) -> None:
        _kernels("add_norm").add_norm(*arguments)

    def add_norm_backward(self, *arguments: Any) -> None:
        _kernels("add_norm").add_norm_backward(*arguments)
